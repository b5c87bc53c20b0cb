"""The losses as modules, and under PyTorch's own name: errors in their own words."""

from __future__ import annotations

import pytest
import torch
from contract import make_case
from torch.nn import functional as F

import softprompt_fast as spf


@pytest.mark.parametrize(
    ("module", "own"), [(spf.LinearNLLLoss, "label_smoothing"), (spf.LinearKLLoss, "beta")]
)
def test_a_module_refuses_its_options_when_it_is_built(module, own):
    text = f"{module.__name__} has no option 'temprature': it takes .*{own}.* temperature"
    with pytest.raises(TypeError, match=text):
        module(temprature=1.0)
    with pytest.raises(ValueError, match="temperature must be above 0 .*: got -1"):
        module(temperature=-1)
    with pytest.raises(ValueError, match=rf"{own} must be in \[0, 1\]: got 2"):
        module(**{own: 2})
    with pytest.raises(TypeError, match="softcap must be an int or a float: got str '3'"):
        module(softcap="3")
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, none: got 'avg'"):
        module(reduction="avg")


# --- linear_cross_entropy ---


def test_linear_cross_entropy_refuses_what_only_pytorchs_takes():
    case = make_case("linear_nll")
    arguments = (case.hidden, case.weight)
    with pytest.raises(TypeError, match="target must hold class indices: got class probabilities"):
        spf.linear_cross_entropy(*arguments, torch.rand(9, 131))
    with pytest.raises(ValueError, match=r"options must be None.*workspace_mib"):
        spf.linear_cross_entropy(*arguments, case.targets, options={"chunk": 1})
    weight = torch.rand(131)
    with pytest.raises(ValueError, match="weight and label_smoothing cannot be combined"):
        spf.linear_cross_entropy(*arguments, case.targets, weight=weight, label_smoothing=0.1)
    with pytest.raises(
        ValueError, match=r"weight must have one entry per class, shape \(131,\): got \(130,\)"
    ):
        spf.linear_cross_entropy(*arguments, case.targets, weight=weight[1:])


def test_linear_cross_entropy_speaks_of_its_own_arguments():
    case = make_case("linear_nll")
    good = {"input": case.hidden, "linear_weight": case.weight, "target": case.targets}
    targets, trained = case.targets, case.weight.clone().requires_grad_()
    late = targets.clone()
    late[4] = 131
    for error, text, wrong in [
        (ValueError, "linear_weight must be frozen", {"linear_weight": trained}),
        (ValueError, r"linear_weight .* neither of them 0", {"linear_weight": torch.ones(0, 24)}),
        (ValueError, "input and linear_weight disagree", {"input": torch.ones(9, 25)}),
        (TypeError, "input must be a tensor: got list", {"input": [1.0]}),
        (ValueError, "linear_bias must have shape", {"linear_bias": torch.ones(1)}),
        (TypeError, "target must be an int64 or int32 .*: got list", {"target": [1] * 9}),
        (ValueError, "target must have one entry per token", {"target": targets[1:]}),
        (IndexError, r"the target at \[4\] is 131", {"target": late}),
        (TypeError, "weight must be a tensor: got list", {"weight": [1.0] * 131}),
        (TypeError, "weight must be a floating-point", {"weight": torch.ones(131).long()}),
        (ValueError, "weight must be constant", {"weight": torch.ones(131, requires_grad=True)}),
        (ValueError, "weight is on meta", {"weight": torch.ones(131, device="meta")}),
        (TypeError, "ignore_index must be an int", {"ignore_index": 1.5}),
    ]:
        with pytest.raises(error, match=f"^{text}"):
            spf.linear_cross_entropy(**{**good, **wrong})


def test_an_infinite_weight_of_a_class_that_nothing_has():
    """Class 0 is the one that an ignored target is looked up as."""
    case = make_case("linear_nll", ignored=0.5)
    case.targets[case.targets == 0] = 1
    weight = torch.rand(131)
    weight[0] = torch.inf
    loss = spf.linear_cross_entropy(case.hidden, case.weight, case.targets, weight=weight)
    expected = F.cross_entropy(case.hidden @ case.weight.T, case.targets, weight=weight)
    torch.testing.assert_close(loss, expected)
