"""Networks as ONNX files, by torch's own exporter, and run by ONNX Runtime."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedsparse.models.modes import evaluating
from fedsparse.models.text import TextClassifier

MISSING = "format=onnx needs onnx, onnxscript and onnxruntime: pip install 'fedsparse[export]'"


class _Uncut(nn.Module):
    """A text classifier that keeps all columns: how many are padding is not known when the file is written."""

    def __init__(self, net: TextClassifier) -> None:
        super().__init__()
        self.net, self.pad = net.net, net.pad

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(input_ids=x, attention_mask=(x != self.pad).long()).logits
        return logits


def write_onnx(net: nn.Module, x: Tensor, path: Path) -> None:
    """Write a network: input ``input``, output ``logits``, the first dimension of both free.

    Args:
        net: the network; it is written as it computes in eval mode.
        x: inputs (N, ...) of two samples or more; all dimensions but the first are fixed to theirs.
        path: the file, weights included; one of 2 GB or more has them in files beside it.

    Raises:
        ValueError: a package is not installed, or torch cannot export the network.

    """
    _need()
    whole = _Uncut(net) if isinstance(net, TextClassifier) else net
    free = ({0: torch.export.Dim("batch")},)
    options: dict[str, Any] = {"input_names": ["input"], "output_names": ["logits"], "verbose": False}
    try:
        with evaluating(whole), _quiet():
            torch.onnx.export(
                whole, (x.clone(),), str(path), dynamo=True, dynamic_shapes=free, external_data=False, **options
            )
    except Exception as error:  # the exporter raises whatever the network's own code leads to
        said = str(error).partition("\n")[0]
        raise ValueError(f"torch cannot export this network to ONNX ({type(error).__name__}: {said})") from error


def onnx_forward(path: Path, threads: int = 1) -> Callable[[Tensor], Tensor]:
    """Load a file into ONNX Runtime, on the CPU: a function of inputs (N, ...) to outputs.

    Raises:
        ValueError: ONNX Runtime is not installed.

    """
    runtime = _need()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"input": x.numpy()})[0])


def _need() -> Any:
    """Import ONNX Runtime, and what the exporter needs."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(MISSING) from error
    return onnxruntime


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what the exporter says of its own progress, and of constants that it could not fold."""
    log = logging.getLogger("onnxscript")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
