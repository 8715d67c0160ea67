"""What a page holds: a README as it is, or what a file of code makes public, and itself."""

import ast
import inspect
import os
import pydoc
import re
import sys
import textwrap
import typing
from functools import cache
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms import SphinxTransform
from sphinx.util.nodes import make_refnode

import samfn

ROOT = Path(samfn.__file__).parents[1]
CHAPTERS = (
    *("samfn", "samfn/methods", "samfn/imperative", "samfn/distributed", "samfn/storage"),
    *("samfn/measure", "samfn/training", "recipes", "recipes/trainers", "bench"),
    *("bench/faults", "tests"),
)
READMES = [*(f"{folder}/README.md" for folder in CHAPTERS), ".github/CONTRIBUTING.md"]
LINK = re.compile(r"\[([^]]*)\]\(([^)#\s:]+)(#[^)]+)?\)")
LINKS = nodes.reference | addnodes.pending_xref
TYPE_IN_QUOTES = re.compile(r"'([A-Z]\w*|\w[^']*[|[][^']*)'")
# What no signature can hold.
NO_CODE = re.compile(r"(?<==)lambda .*?: [^,)]*|<factory>|<function [^ ]*>")
SOURCE = """
.. raw:: html

   <details{}><summary>Source</summary>

.. literalinclude:: /{}

.. raw:: html

   </details>
"""


def names_of(place):
    """Return the names that a module makes public."""
    if place is samfn:
        return re.findall(r"(\w+) as \1\b", inspect.getsource(samfn))
    own = [name for name, value in vars(place).items() if home_of(value) == place.__name__]
    return getattr(place, "__all__", [name for name in own if name[0] != "_"])


def home_of(value):
    """Return the module that defines a function or class; None of anything else."""
    return value.__module__ if inspect.isroutine(value) or inspect.isclass(value) else None


def public():
    """Return what is public by its shortest name, in the order of the algorithm."""
    found, seen = {}, set()
    places = [samfn, *(each for each in vars(samfn).values() if hasattr(each, "__all__"))]
    for place in places:  # which grows
        for name in names_of(place):
            value = getattr(place, name)
            if inspect.ismodule(value) and value not in places:
                places.append(value)
            elif home_of(value) and id(value) not in seen:
                seen.add(id(value))
                found[f"{place.__name__}.{name}"] = value
    return found


PUBLIC = public()
HOMES = list(dict.fromkeys(value.__module__ for value in PUBLIC.values()))


def path_of(module):
    """Return the file of a module, from the root."""
    return os.path.relpath(sys.modules[module].__file__, ROOT)


def reference():
    """Return the pages of the reference: files of samfn, and its packages."""
    return [*dict.fromkeys(path_of(".".join(home.split(".")[:2])) for home in HOMES)]


def target_of(link, folder):
    """Return the file that a link leads to; a page of a folder, or None, if to a folder."""
    path = folder / link
    if not path.is_dir():
        return path
    inside = (path / name for name in ("README.md", "__init__.py"))
    return next((page for page in inside if page.exists()), None)


def found():
    """Return the files that have a page: those of the sidebar, and what READMEs link to."""
    files = {"README.md", *READMES, *map(path_of, ["samfn", *HOMES]), *reference()}
    for readme in map(ROOT.joinpath, ["README.md", *READMES]):
        links = LINK.findall(readme.read_text())
        targets = filter(None, (target_of(link, readme.parent) for _, link, _ in links))
        files |= {os.path.relpath(target, ROOT) for target in targets}
    return sorted(name for name in files if name.endswith((".md", ".py")))


def page(app, docname, content):
    """Put in the place of a file what stands on its page."""
    name = os.path.relpath(app.env.doc2path(docname), ROOT)
    if name.endswith(".py"):
        content[0] = code(name)
        return
    content[0] = readme(content[0], (ROOT / name).parent)
    if name == "README.md":
        content[0] += sidebar("Guide", READMES)
        content[0] += sidebar("Reference", [path_of("samfn"), *reference()])
    elif name not in READMES:
        content[0] = f"---\norphan: true\n---\n{content[0]}"


def readme(text, folder):
    """Return a README in which links to folders are to their pages."""

    def changed(link):
        label, target, anchor = link.groups()
        page = target_of(target, folder)
        there = page and os.path.relpath(page, folder) + (anchor or "")
        return f"[{label}]({there})" if there else label

    return LINK.sub(changed, text)


def sidebar(caption, files):
    """Return a part of the sidebar."""
    names = [f"/{os.path.splitext(name)[0]}" for name in files]
    return "\n".join(["\n```{toctree}", ":hidden:", f":caption: {caption}", *names, "```"])


def code(name):
    """Return the page of a file of code: what is public in it or its package, and it."""
    module = name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    title = name.removeprefix("samfn/").removesuffix("__init__.py") or "Public names"
    inner = [home for home in HOMES if home.startswith(f"{module}.")]
    shown = bool(inner) or module in HOMES
    text = ["" if shown else ":orphan:", "", title, "=" * len(title), ""]
    if shown:
        text += [f".. automodule:: {module}", "   :no-index:" * (module in PUBLIC), ""]
    for home in inner:
        text += [
            f".. rubric:: :doc:`/{path_of(home)[:-3]}`",
            "",
            first_line(sys.modules[home]),
        ]
        text += [
            "",
            *(f"* :py:obj:`{full}`: {first_line(PUBLIC[full])}" for full in own(home)),
        ]
        text += [""]
    if inner and module != "samfn":
        text += [".. toctree::", "   :hidden:", ""]
        text += [f"   /{path_of(home)[:-3]}" for home in inner]
    text += documented(module) if module in HOMES else []
    return "\n".join(text) + SOURCE.format("" if shown else " open", name)


def first_line(value):
    """Return what a module, function or class says it is."""
    return inspect.getdoc(value).splitlines()[0]


def own(module):
    """Return the public names of what a module defines, in its order."""
    order = [id(value) for value in vars(sys.modules[module]).values()]
    names = [name for name, value in PUBLIC.items() if value.__module__ == module]
    return sorted(names, key=lambda name: order.index(id(PUBLIC[name])))


def documented(module):
    """Return directives that document what is public in a module; types come last."""
    text = []
    for full in own(module):
        place, _, name = full.rpartition(".")
        kind = "class" if inspect.isclass(PUBLIC[full]) else "function"
        kind = "exception" if name.endswith("Error") else kind
        text += ["", f".. currentmodule:: {place}", "", f".. auto{kind}:: {name}"]
        text += ["   :members:"] if kind == "class" else []
    for node in ast.parse(inspect.getsource(sys.modules[module])).body:
        if isinstance(node, ast.Assign) and is_type(module, ast.unparse(node.targets)):
            text += ["", f".. py:data:: {module}.{ast.unparse(node.targets)}"]
            text += [f"   :value: {ast.unparse(node.value)}"]
    return text


def is_type(module, name):
    """Return whether a value is a type that public signatures call by its name."""
    origin = typing.get_origin(vars(sys.modules[module]).get(name))
    return origin and any(
        re.search(rf"\b{name}\b", written(each)) for each in PUBLIC.values()
    )


@cache
def written(value):
    """Return the signature of a function as its code has it, with the names of types."""
    try:
        node = ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]
    except (OSError, TypeError):  # made by dataclass or namedtuple
        return ""
    if not isinstance(node, ast.FunctionDef) or not node.returns:
        return ""
    text = f"({ast.unparse(node.args)}) -> {ast.unparse(node.returns)}"
    return TYPE_IN_QUOTES.sub(r"\1", text)


def signature(app, what, name, obj, options, *usual):
    """Return arguments and result as the code has them; of a class, those to make one."""
    if what == "method" and not name.endswith(f".{obj.__name__}"):  # default of a field
        return "", None
    text = written(vars(obj).get("__init__") if what == "class" else obj)
    arguments, _, returns = re.sub(r"^\(self(, )?", "(", text).partition(" -> ")
    arguments, returns = (arguments, returns) if text else usual
    arguments = arguments and NO_CODE.sub("...", arguments)
    return arguments, None if what == "class" else returns


def type_named(app, env, node, shown):
    """Return a link to what a type is called by, without its module."""
    known = env.domains["py"].objects.items()
    found = [(full, to) for full, to in known if full.endswith(f".{node['reftarget']}")]
    found = [(full, to) for full, to in found if to.objtype in ("class", "data")]
    if node["reftype"] != "class" or len(found) != 1:
        return None
    full, to = found[0]
    return make_refnode(app.builder, node["refdoc"], to.docname, to.node_id, shown, full)


class Names(SphinxTransform):
    """Names in code become links to what they name."""

    default_priority = 400

    def apply(self):
        """Link what names something of samfn; on its own pages, also without `samfn.`."""
        for literal in [*self.document.findall(nodes.literal)]:
            full = self.meant(literal)
            if full and not isinstance(literal.parent, LINKS | nodes.title):
                link = addnodes.pending_xref(
                    "", refdomain="py", reftype="obj", reftarget=full
                )
                link.update_all_atts({"refdoc": self.env.docname, "refwarn": True})
                literal.replace_self(link)
                link += literal

    def meant(self, literal):
        """Return the full name of what is meant; None if it has no page."""
        name = literal.astext().partition("(")[0]
        if re.fullmatch(r"samfn(\.[A-Za-z]\w*)+", name):
            return name if name in PUBLIC or not pydoc.locate(name) else None
        module = self.env.docname.replace("/", ".")
        if not module.startswith(("samfn", "README")) or name in self.arguments(literal):
            return None
        places = ("samfn", module.rpartition(".")[0], module)
        return next((f"{p}.{name}" for p in places if f"{p}.{name}" in PUBLIC), None)

    def arguments(self, node):
        """Return the names of the arguments of what a node is in the description of."""
        while node and not isinstance(node, addnodes.desc):
            node = node.parent
        return (
            [each.astext() for each in node[0].findall(addnodes.desc_sig_name)]
            if node
            else []
        )


def start(app, error):
    """Let the folder open at the front page."""
    to = '<meta http-equiv="refresh" content="0; url=README.html">'
    Path(app.outdir, "index.html").write_text(f"<!doctype html>{to}\n")


def setup(app):
    """Let Sphinx read a file as its page."""
    app.connect("source-read", page)
    app.connect("autodoc-process-signature", signature)
    app.connect("missing-reference", type_named)
    app.connect("build-finished", start)
    app.add_transform(Names)
