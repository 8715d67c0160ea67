"""Sharpness-aware training as pure functions over parameter dicts.

The public names, in the order of the algorithm: a loss and its gradient, the ascent, the
methods, the descent, a step; then what stands around it.
"""

# isort: off
from samfn.tree import norm as norm
from samfn.loss import Aux as Aux, Loss as Loss, l2_regularized as l2_regularized
from samfn.gradient import (
    GradientError as GradientError,
    Pass as Pass,
    evaluate as evaluate,
)
from samfn.perturb import (
    adaptive_metric as adaptive_metric,
    everything as everything,
    named_weight as named_weight,
    perturb as perturb,
    perturb_adaptive as perturb_adaptive,
    perturb_fisher as perturb_fisher,
    perturb_spectral as perturb_spectral,
    perturb_layerwise as perturb_layerwise,
)
from samfn.methods import (
    Method as Method,
    accumulated as accumulated,
    ae_sam as ae_sam,
    asam as asam,
    ascent_on as ascent_on,
    awp as awp,
    esam as esam,
    every as every,
    fisher_sam as fisher_sam,
    friendly_sam as friendly_sam,
    functional_sam as functional_sam,
    gsam as gsam,
    le_sam as le_sam,
    light_sam as light_sam,
    looksam as looksam,
    loss_scaled as loss_scaled,
    momentum_sam as momentum_sam,
    multi_step_sam as multi_step_sam,
    on_loss as on_loss,
    on_parameters as on_parameters,
    per_micro_batch as per_micro_batch,
    preconditioned as preconditioned,
    spectral_sam as spectral_sam,
    rwp as rwp,
    s2_sam as s2_sam,
    sagm as sagm,
    sam as sam,
    same_randomness as same_randomness,
    ssam as ssam,
    sub_batch_ascent as sub_batch_ascent,
    unified_sam as unified_sam,
    usam as usam,
    vasso as vasso,
    watched as watched,
    wsam as wsam,
)
from samfn.descend import Optimizer as Optimizer, descend as descend
from samfn.optimizers import (
    adagrad as adagrad,
    adam as adam,
    adamw as adamw,
    clipped as clipped,
    from_torch as from_torch,
    frozen_after as frozen_after,
    grouped as grouped,
    muon as muon,
    nadam as nadam,
    rmsprop as rmsprop,
    scaled_lr as scaled_lr,
    sgd as sgd,
)
from samfn.step import (
    Metrics as Metrics,
    NonFiniteError as NonFiniteError,
    TrainState as TrainState,
    find_nonfinite as find_nonfinite,
    init as init,
    require_finite as require_finite,
    sam_update as sam_update,
)
from samfn.modules import (
    load as load,
    no_decay_parameters as no_decay_parameters,
    norm_parameters as norm_parameters,
    reestimated as reestimated,
    split as split,
    supervised as supervised,
)
from samfn.compiled import compile_update as compile_update
from samfn.imperative import SAM as SAM
from samfn.storage import (
    CheckpointCorruptError as CheckpointCorruptError,
    CheckpointError as CheckpointError,
    CheckpointFormatError as CheckpointFormatError,
    Checkpoints as Checkpoints,
    CheckpointWriteError as CheckpointWriteError,
    ExportError as ExportError,
    Found as Found,
    InUseError as InUseError,
    export_program as export_program,
    export_weights as export_weights,
    held as held,
    random_state as random_state,
    restore as restore,
    save as save,
    set_random_state as set_random_state,
)
from samfn.training.averaging import mean_of as mean_of, moving_average as moving_average
from samfn.measure.objective import Objective as Objective
from samfn import (
    distributed as distributed,
    measure as measure,
    schedules as schedules,
    training as training,
)
