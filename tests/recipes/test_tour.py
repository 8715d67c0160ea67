"""The notebook: its cells run, and it has its pictures in place."""

import json

import matplotlib.pyplot as plt

from tests import ROOT

TOUR = json.loads((ROOT / "recipes" / "tour.ipynb").read_text())
CODE = [cell for cell in TOUR["cells"] if cell["cell_type"] == "code"]


def test_every_cell_runs_after_those_before_it(monkeypatch, capsys):
    shown, scope = [], {}
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf().axes))
    for cell in CODE:
        code = "".join(cell["source"])
        exec(code.replace("epochs=60", "epochs=2"), scope)
    assert len(shown) == 2
    plt.close("all")
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert scope["cube"].gradients == 2


def test_what_it_printed_and_drew_is_in_it():
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    text = "".join(line for output in outputs for line in output.get("text", []))
    assert "SAM, rho 0.3" in text
    assert not any(output["output_type"] == "error" for output in outputs)
    fitted = [float(line.split("fit, ")[1].split(" ")[0]) for line in text.splitlines()[:2]]
    assert fitted[1] > fitted[0] + 10  # SAM ahead of SGD on the test
