"""Formulas of docstrings, which are written to be read in a terminal, set as mathematics.

The formula of a docstring is its second paragraph, if that does not end in a full stop.
"""

import re
from functools import partial

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

GREEK = ("alpha", "beta", "gamma", "eta", "theta", "pi", "rho", "sigma")
NAMES = {name: rf"\{name} " for name in (*GREEK, "min", "max", "cos")}
NAMES |= {"grad": r"\nabla ", "E": r"\mathbb{E} ", "tr": r"\operatorname{tr} "}
NAMES |= {"*": r"\cdot ", ".": r"\cdot ", "dw": "dw", "d1": "d_1", "d2": "d_2"}
SIGNS = {"<-": r"\leftarrow ", "->": r"\rightarrow ", "<=": r"\le ", ">=": r"\ge "}
SIGNS |= {sign: sign for sign in "+-=,"}
SCRIPTS = {"^": "^", "**": "^", "_": "_"}
BRACKETS = {
    "(": (r"\left(", r"\right)", ")"),
    "|": (r"\left\lvert ", r"\right\rvert ", "|"),
    "||": (r"\left\lVert ", r"\right\rVert ", "||"),
    "{": (r"\{", r"\}", "}"),
}
BESIDE_VARIABLES = {"*", "/", *SIGNS, *SCRIPTS} - {",", "->"}
LETTER = re.compile(r"((?:^|: )[A-Za-z])\.(?= |$)")  # begins no list
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
TOKEN = re.compile(
    r"`[^`]*`|(?<= )-\d+|<[-=]|->|>=|\*\*|\|\||d[12]\b|[A-Za-z]{2,}(?:_[a-z]{2,})+"
    r"|[A-Za-z]+(?:[-'][A-Za-z]+)*|\d+(?:\.\d+)?|\S"
)


def to_rest(formula):
    """Return a formula as a sentence with mathematics in it."""
    parts, run, ends = [], [], []
    tokens = TOKEN.findall(formula)
    for before, token, after in zip(["", *tokens], tokens, [*tokens[1:], ""], strict=False):
        prose = is_prose(before, token, after)
        if not ends and (prose or token in ",;:"):
            parts += [_math(run), token.replace(";", ";\N{EM SPACE}")]
            run = []
            continue
        run.append(_words(token, after) if prose else token)
        if ends and token == ends[-1]:
            ends.pop()
        elif token in BRACKETS:
            ends.append(BRACKETS[token][-1])
    return re.sub(r" (?=[,;:](\s|$))", "", " ".join(filter(None, [*parts, _math(run)])))


def is_prose(before, token, after):
    """Return whether a token is a word of the sentence: no variable, function or sign."""
    if token == "a":
        return len(after) > 2 and after.isalpha()
    if not token[0].isalpha() or len(token) == 1 or token in NAMES:
        return token[0] == "`"
    variable = "_" in token or after == "(" or {before, after} & BESIDE_VARIABLES
    return token == "sum" or after == ":" or not variable


def _words(token, after):
    return rf"\text{{{token}{'' if after in ',)' else ' '}}}"


def _math(tokens):
    return rf":math:`\displaystyle {_tex([*tokens, ''], '').strip()}`" if tokens else ""


def _tex(tokens, end):
    """Take tokens up to the one that ends them, and return their TeX."""
    terms, factors = "", []
    while (token := tokens.pop(0)) != end:
        if token == "/" and tokens[0]:
            below = _bare(_factor(tokens.pop(0), tokens))
            factors = [rf"\frac{{{_bare(*factors)}}}{{{below}}}"]
        elif token in SIGNS or token.startswith(r"\text"):
            terms += "".join(factors) + SIGNS.get(token, token)
            factors = []
        else:
            factors.append(_factor(token, tokens))
    return terms + "".join(factors)


def _factor(token, tokens):
    shown = _atom(token, tokens)
    while tokens[0] in SCRIPTS:
        mark = SCRIPTS[tokens.pop(0)]
        shown += rf"{mark}{{{_bare(_atom(tokens.pop(0), tokens))}}}"
    return shown


def _atom(token, tokens):
    if token == "sqrt":
        return rf"\sqrt{{{_bare(_atom(tokens.pop(0), tokens))}}}"
    if token == "-":
        return "-" + _atom(tokens.pop(0), tokens)
    if token in BRACKETS:
        left, right, end = BRACKETS[token]
        inner = _tex(tokens, end)
        grows = end != ")" or r"\frac" in inner
        return left + inner + right if grows else f"({inner})"
    if token in NAMES or not token[0].isalpha() or len(token) == 1:
        return NAMES.get(token, token)
    name = token.replace("_", r"\_")
    beside = tokens[0][:1].isalpha() or tokens[0] == "||"
    return rf"\mathrm{{{name}}}" + (r"\," if beside else "")


def _bare(*factors):
    """Return factors without the parentheses that a line or a root makes unnecessary."""
    for left, right in (BRACKETS["("][:2], "()"):
        if len(factors) == 1 and factors[0].startswith(left) and factors[0].endswith(right):
            return factors[0].removeprefix(left).removesuffix(right)
    return "".join(factors)


def mark(app, what, name, obj, options, lines):
    """Set the formula of a docstring as mathematics, and link papers."""
    if "".join(lines).startswith("Alias for field number"):  # as namedtuple says
        lines.clear()
    start = lines.index("") + 1 if "" in lines else len(lines)
    end = next((i for i in range(start, len(lines)) if not lines[i]), len(lines))
    paragraph = " ".join(lines[start:end])
    if paragraph and paragraph[0] != " " and paragraph[-1] not in ".:":
        try:
            lines[start:end] = [".. rst-class:: formula", "", to_rest(paragraph)]
        except IndexError as error:
            raise ValueError(f"{name} has a formula without an end: {paragraph}") from error
    if "Returns:" in lines:  # In words: no type stands before a colon.
        lines[lines.index("Returns:")] = ":returns:"
    if what == "attribute":  # Nor here; napoleon would take it for one.
        lines[:0] = ["..", ""]
    for i, line in enumerate(lines):
        line = LETTER.sub(r"\1\\.", line)
        lines[i] = ARXIV.sub(r"`\g<0> <https://arxiv.org/abs/\1>`__", line)


def show(writer, node, block=False):
    """Write mathematics as MathML, which browsers show without a script."""
    writer.body.append(tex2mathml(node.astext(), as_block=block))
    raise nodes.SkipNode


def setup(app):
    """Let Sphinx mark formulas before it reads sections, and show them."""
    app.connect("autodoc-process-docstring", mark, priority=400)
    renderers = (show, None), (partial(show, block=True), None)
    app.add_html_math_renderer("mathml", *renderers)
