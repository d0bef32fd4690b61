"""A frozen encoder in an ONNX file, run by onnxruntime behind the face of a torch module.

The module holds the file's bytes, not its path: it can be pickled to another machine, and a saved
model stays whole when the file moves. The session is opened on first use in each process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError

_ELEMENT_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def find_onnx(name: str, weights_dir: Path | None) -> Path:
    """The file of `onnx/FILE`: a path, or a file name in `weights_dir`.

    Raises:
        InputError: no such file, with the places that were tried.
    """
    file = Path(name.removeprefix("onnx/"))
    tried = [file] if weights_dir is None else [weights_dir / file, file]
    for path in tried:
        if path.is_file():
            return path
    raise InputError(
        f"no such ONNX file: tried {', '.join(str(p) for p in tried)}",
        where=name,
        hint="put the file into the folder given as --weights DIR, or write onnx/PATH",
    )


class OnnxNetwork(nn.Module):
    """`[N, 3, S, S]` normalised pictures to `[N, D]` or `[N, D, h, w]`, without gradients.

    The first input and output of the file are used, whatever their names. A file of a fixed batch
    size is fed batches of that size, the last one padded.
    """

    def __init__(self, name: str, model_bytes: bytes) -> None:
        """Raises InputError when onnxruntime cannot open the file or it reads no RGB pictures."""
        super().__init__()
        self.name = name
        self.model_bytes = model_bytes
        self._session: Any = None
        entry = self._open().get_inputs()[0]
        shape = [d if isinstance(d, int) and d > 0 else None for d in entry.shape]
        if len(shape) != 4 or shape[1] not in (3, None) or shape[2] != shape[3]:
            raise InputError(
                f"its input {entry.name!r} is {entry.shape}, not [N, 3, S, S]", where=name
            )
        if entry.type not in _ELEMENT_TYPES:
            raise InputError(
                f"its input {entry.name!r} is {entry.type}",
                where=name,
                hint=f"valid: {', '.join(_ELEMENT_TYPES)}",
            )
        self._dtype = _ELEMENT_TYPES[entry.type]
        self.fixed_batch, self.fixed_size = shape[0], shape[2]

    def choose_size(self, size: int, *, asked: bool) -> int:
        """The picture's side: the file's if it is fixed there, else `size`.

        Raises:
            InputError: another size was `asked` for than the file's.
        """
        if asked and self.fixed_size not in (None, size):
            raise InputError(
                f"{self.name} reads pictures of {self.fixed_size} px only, but got {size}",
                where="image_size",
            )
        return self.fixed_size or size

    def forward(self, images_N3hw: Tensor) -> Tensor:
        """Features as float32 on the pictures' device."""
        images = images_N3hw.detach().cpu().numpy().astype(self._dtype)
        num_images = len(images)
        step = self.fixed_batch or max(num_images, 1)
        parts = []
        for start in range(0, num_images, step):
            batch = images[start : start + step]
            missing = step - len(batch) if self.fixed_batch else 0
            padded = np.pad(batch, ((0, missing), (0, 0), (0, 0), (0, 0)))
            parts.append(self._run(padded)[: len(batch)])
        features = torch.from_numpy(np.concatenate(parts).astype(np.float32, copy=False))
        return features.to(images_N3hw.device)

    def _run(self, images: Any) -> Any:
        session = self._open()
        names = [session.get_outputs()[0].name]
        try:
            (features,) = session.run(names, {session.get_inputs()[0].name: images})
        except Exception as error:  # see _open
            raise RuntimeError(f"onnxruntime: {_first_line(error)}") from error
        if features.ndim not in (2, 4):
            raise InputError(
                f"its output {names[0]!r} is of shape {features.shape}, not [N, D] or [N, D, h, w]",
                where=self.name,
            )
        return features

    def _open(self) -> Any:
        if self._session is None:
            import onnxruntime as ort

            options = ort.SessionOptions()
            # The caller's share of the machine: several workers run side by side.
            options.intra_op_num_threads = torch.get_num_threads()
            wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
            providers = [p for p in wanted if p in ort.get_available_providers()]
            try:
                self._session = ort.InferenceSession(self.model_bytes, options, providers=providers)
            except Exception as error:  # onnxruntime's errors share no base class but Exception
                raise InputError(
                    f"onnxruntime cannot open it: {_first_line(error)}",
                    where=self.name,
                    hint="an encoder must be one whole .onnx file without external data",
                ) from error
        return self._session

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_session": None}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
