"""The site: the READMEs are its chapters, the files of code its reference.

python -m sphinx -W -c .github/docs . build/site
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

import formulas  # noqa: E402
import pages  # noqa: E402

project = author = "samfn"
root_doc = "README"
html_title = "samfn"
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_copyright = html_copy_source = html_show_sphinx = False

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
source_suffix = {".md": "markdown", ".py": "restructuredtext"}
include_patterns = pages.found()
exclude_patterns = [".git", "runs", "build", "dist", "**/__pycache__"]
default_role = "literal"
myst_heading_anchors = 3
myst_fence_as_directive = ["math"]
smartquotes_action = "D"
napoleon_custom_sections = ["Source"]
python_maximum_signature_line_length = 72
autodoc_member_order = "bysource"

nitpicky = True
# Types of other libraries, whose pages are not fetched, and types without a page here.
OTHERS = r"(torch|nn|os|pathlib|contextlib|collections|typing|samfn)\..*"
nitpick_ignore_regex = [("py:(class|exc)", rf"{OTHERS}|\w+")]


def setup(app):
    """Tell Sphinx what it does not do by itself."""
    pages.setup(app)
    formulas.setup(app)
