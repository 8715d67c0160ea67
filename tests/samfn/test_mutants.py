"""Each way to get SAM wrong makes the tests that pin it down fail."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests import ROOT

# Name -> file, the right line, a wrong one, and the test that tells them apart.
MUTANTS = {
    "no normalisation": (
        "perturb.py",
        "rho / length, 0.0)",
        "rho, 0.0)",
        "samfn/test_perturb::test_moves_a_distance_rho",
    ),
    "norm of each tensor": (
        "perturb.py",
        "return tree.add_scaled(params, rate(tree.norm(grads), rho), grads)",
        "return {n: tree.add_scaled({n: w}, rate(tree.norm({n: grads[n]}), rho),"
        " {n: grads[n]})[n] for n, w in params.items()}",
        "samfn/test_perturb::test_does_not_depend_on_how_the_vector_is_cut_into_tensors",
    ),
    "wrong sign": (
        "perturb.py",
        "rate(tree.norm(grads), rho), grads)",
        "-rate(tree.norm(grads), rho), grads)",
        "samfn/test_perturb::test_moves_in_the_steepest_direction",
    ),
    "no guard at zero": (
        "perturb.py",
        "torch.where(length > smallest, rho / length, 0.0)",
        "rho / length",
        "samfn/test_perturb::test_zero_gradient_gives_back_the_parameters_exactly",
    ),
    "guard by adding 1e-6": (
        "perturb.py",
        "torch.where(length > smallest, rho / length, 0.0)",
        "rho / (length + 1e-6)",
        "samfn/test_perturb::test_length_is_rho_or_zero_whatever_the_size_of_the_gradient",
    ),
    "sum of absolute values": (
        "tree.py",
        "torch._foreach_norm(leaves, 2, dtype=dtype)",
        "torch._foreach_norm(leaves, 1, dtype=dtype)",
        "samfn/test_perturb::test_moves_a_distance_rho",
    ),
    "in place": (
        "tree.py",
        "torch._foreach_add(*_aligned(left, right))",
        "[a.add_(b) for a, b in zip(*_aligned(left, right), strict=True)]",
        "samfn/test_perturb::test_inputs_stay_and_results_are_new",
    ),
    "statistics counted twice": (
        "methods/base.py",
        "worst = evaluate(perturbed, point.buffers, point.batch)",
        "worst = evaluate(perturbed, clean.buffers, point.batch);"
        " clean = clean._replace(buffers=worst.buffers)",
        "samfn/test_step::test_200_steps_equal_a_sam_that_overwrites_weights",
    ),
    "loss of the perturbed pass": (
        "methods/base.py",
        "return Descent(worst.grads, clean, worst.loss, length)",
        "return Descent(worst.grads, clean._replace(loss=worst.loss), worst.loss, length)",
        "samfn/test_step::test_200_steps_equal_a_sam_that_overwrites_weights",
    ),
    "gradient of the clean pass": (
        "methods/base.py",
        "return Descent(worst.grads, clean,",
        "return Descent(clean.grads, clean,",
        "samfn/test_step::test_200_steps_equal_a_sam_that_overwrites_weights",
    ),
    "descent from the perturbed weights": (
        "methods/base.py",
        "worst = evaluate(perturbed, point.buffers, point.batch)",
        "worst = evaluate(perturbed, point.buffers, point.batch);"
        " [point.params[n].copy_(w) for n, w in perturbed.items()]",
        "samfn/test_step::test_200_steps_equal_a_sam_that_overwrites_weights",
    ),
    "the orthogonal part of another gradient": (
        "methods/published.py",
        "_orthogonal(worst, clean)",
        "_orthogonal(clean, worst)",
        "samfn/methods/test_published::test_a_training_is_that_of_the_papers_equations_in_numpy",
    ),
    "the mean is updated before it is subtracted": (
        "methods/published.py",
        'direction = tree.add_scaled(grads, -sigma, memory["mean"])',
        "direction = tree.add_scaled(grads, -sigma,"
        ' _averaged(memory, grads, 1 - decay)["mean"])',
        "samfn/methods/test_published::test_a_training_is_that_of_the_papers_equations_in_numpy",
    ),
    "momentum the other way": (
        "methods/one_pass.py",
        'tree.scale(memory["momentum"], -1.0)',
        'tree.scale(memory["momentum"], 1.0)',
        "samfn/methods/test_published::test_a_training_is_that_of_the_papers_equations_in_numpy",
    ),
    "sharpness beside the optimizer is not looked at": (
        "step.py",
        "looked_at.append(tree.norm(seen.beside))",
        "pass",
        "samfn/test_realities::test_160_bad_numbers_leave_every_tensor_bit_equal",
    ),
    "a step that is not finite is taken": (
        "step.py",
        "params=tree.select(finite, new_params, params)",
        "params=new_params",
        "samfn/test_step::test_a_step_that_is_not_finite_changes_no_tensor_and_is_counted",
    ),
    "the model has its own weights back before the backward pass": (
        "modules/supervised.py",
        "            yield found\n\n    @property",
        "            pass\n        yield found\n\n    @property",
        "bench/test_zoo::test_a_step_is_that_of_a_plain_loop_or_refused_with_its_reason"
        "[checkpoint]",
    ),
    "what is computed again writes to the caller's statistics": (
        "modules/supervised.py",
        "self._lender.put(again)",
        "self._lender.put(buffers)",
        "samfn/modules/test_supervised::test_what_is_computed_again_counts_batches_once",
    ),
    "buffers that are assigned are lost": (
        "modules/supervised.py",
        "after = {**buffers, **self._lender.left()}",
        "after = {**buffers}",
        "bench/test_zoo::test_a_step_is_that_of_a_plain_loop_or_refused_with_its_reason"
        "[assigned buffer]",
    ),
    "the forward pass may write to the batch": (
        "modules/supervised.py",
        "return kind((inputs.clone(), targets.clone())), []",
        "return kind((inputs, targets)), []",
        "bench/test_zoo::test_a_step_is_that_of_a_plain_loop_or_refused_with_its_reason"
        "[inputs in place]",
    ),
    "the forward pass may write to a batch of several inputs": (
        "modules/supervised.py",
        "copies = [x.clone() if isinstance(x, Tensor) else x for x in given]",
        "copies = given",
        "samfn/modules/test_supervised::"
        "test_a_batch_of_several_inputs_stays_what_it_is_where_forward_writes_to_it",
    ),
    "the mean of nothing counts": (
        "methods/combinators.py",
        "return torch.where(weight > 0, part, 0)",
        "return part",
        "samfn/methods/test_combinators::test_parts_weigh_what_their_losses_are_means_over",
    ),
    "a file is not synced": (
        "storage/files.py",
        "            sync(temporary)\n",
        "",
        "samfn/storage/test_files::test_a_file_is_written_synced_renamed_and_its_directory_synced",
    ),
    "a directory is not synced": (
        "storage/files.py",
        "            sync(path.parent)\n",
        "",
        "samfn/storage/test_files::test_a_file_is_written_synced_renamed_and_its_directory_synced",
    ),
    "the digest is not looked at": (
        "storage/tensorfile.py",
        "if expected is not None and found != expected:",
        'if found == "":',
        "samfn/storage/test_tensorfile::test_every_bit_counts",
    ),
    "dtypes are not in the digest": (
        "storage/tensorfile.py",
        "[str(tensor.dtype), [*tensor.shape], found]",
        "[[*tensor.shape], found]",
        "samfn/storage/test_tensorfile::test_the_digest_is_the_sha256_of_the_manifest",
    ),
    "names may stand twice": (
        "storage/tensorfile.py",
        "if len(found) < len(pairs):",
        "if False:",
        "samfn/storage/test_tensorfile::test_a_name_that_stands_twice_is_refused_even_if_both_say_the_same",
    ),
    "the best goes with the old": (
        "storage/checkpoints.py",
        "return {*last, *(path for paths in best for path in paths)}",
        "return {*last}",
        "samfn/storage/test_checkpoint::test_the_last_few_and_the_best_few_stay",
    ),
    "what a header says of its score counts unverified": (
        "storage/checkpoint.py",
        "return tensorfile.verified_texts(path)",
        "return tensorfile.read_texts(path)",
        "samfn/storage/test_checkpoint::test_a_forged_score_costs_no_whole_checkpoint",
    ),
    "checkpoints are ordered by their names": (
        "storage/checkpoints.py",
        '    return int(path.stem.removeprefix("step_"))\n',
        "    return path.name\n",
        "samfn/storage/test_checkpoint::test_checkpoints_are_ordered_by_number_and_nothing_else_counts",
    ),
    "a conjugate is written as what it is a view of": (
        "storage/tensorfile.py",
        ".resolve_conj()",
        "",
        "samfn/storage/test_checkpoint::test_views_that_conjugate_or_negate_are_written_as_what_they_show",
    ),
    "states that are not finite are kept": (
        "storage/checkpoints.py",
        "            _require_finite(state)\n",
        "",
        "samfn/storage/test_checkpoint::test_states_that_are_not_finite_are_not_kept",
    ),
}


# A process that has loaded torch, once for many mutants; of samfn it loads the last one.
RUN = """
import json, sys
from pathlib import Path
import pytest

class Failed(list):
    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.append(report.nodeid)

def failed(*tests):
    for name in [*sys.modules]:
        if name.partition(".")[0] in ("samfn", "recipes", "bench", "tests"):
            del sys.modules[name]
    failed = Failed()
    code = pytest.main(["-x", "-n0", "-p", "no:cacheprovider", *tests], [failed])
    return int(code), failed

sys.dont_write_bytecode = True  # It is known by the second in which a file was written.
found, mutants = {}, json.loads(sys.argv[1])
for name, (file, right, wrong, test) in mutants.items():
    path = Path(file)
    source = path.read_text()
    path.write_text(source.replace(right, wrong))
    found[name] = failed(test)
    path.write_text(source)
# What failed passes where nothing is wrong; that the others pass is their own to show.
found["none"] = failed(*{each for _, all in found.values() for each in all})
Path("found.json").write_text(json.dumps(found))
"""


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_changes_a_line_that_is_there_once(name):
    file, right, wrong, test = MUTANTS[name]
    assert (ROOT / "samfn" / file).read_text().count(right) == 1
    assert right != wrong
    path, _, function = test.partition("::")
    function = function.partition("[")[0]
    assert f"def {function}(" in (ROOT / "tests" / f"{path}.py").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("part", [0, 1])
def test_the_tests_kill_the_mutants(tmp_path, part):
    mutants = {
        name: (f"samfn/{file}", right, wrong, f"tests/{test}".replace("::", ".py::"))
        for name, (file, right, wrong, test) in [*MUTANTS.items()][part::2]
    }
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__"))
    result = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(mutants)],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((copy / "found.json").read_text())
    assert found.pop("none") == [0, []], result.stdout
    for name, (*_, test) in mutants.items():
        code, failed = found[name]
        assert code == 1, name
        assert [each.partition("[")[0] for each in failed] == [test.partition("[")[0]], name
