"""What is refused as inputs, in words that name what was wrong with them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from robustexplain import checks
from robustexplain.errors import InputError

WRONG: dict[str, tuple[Callable[[], Tensor], str]] = {
    "sparse": (lambda: torch.rand(1, 3, 4, 4).to_sparse(), r"got one of layout torch.sparse_coo; x.to_dense\(\)"),
    "compressed": (lambda: torch.rand(4, 4).to_sparse_csr(), "dense tensor, got one of layout torch.sparse_csr"),
    "nested": (lambda: torch.nested.nested_tensor([torch.rand(3, 4), torch.rand(2, 4)]), "dense tensor"),
    "meta": (lambda: torch.rand(1, 3, 4, 4, device="meta"), "on the meta device, which has none"),
    "a little above 1": (lambda: torch.full((1, 1, 2, 2), 1.0000001), r"got values from 1.00000012 to 1.00000012;"),
    "a little below 0": (lambda: torch.full((1, 1, 2, 2), -1e-7), r"got values from -1.00000001e-07 to"),
}


@pytest.mark.filterwarnings("ignore:.*(Sparse CSR|nested tensors).*:UserWarning")
@pytest.mark.parametrize("case", WRONG)
def test_inputs_that_hold_no_usable_values_are_refused(case: str) -> None:
    made, words = WRONG[case]
    with pytest.raises(InputError, match=words):
        checks.inputs(made())
