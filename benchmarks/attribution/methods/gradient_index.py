"""A cached index of low-rank gradients, as in LoGra and TrackStar.

Of every tracked linear layer, the gradient sum_t delta_t x_t^T of a sequence's loss is projected on both sides, never
held whole, and compared under the damped inverse of the projected Fisher F = E[g g^T] of that layer:

    score(q, s) = sum over layers of g_q^T (F + damping mean(eigenvalues of F) I)^-1 g_s,

divided by the length of s's whitened gradient with `unit_norm`. Stored are coordinates in the eigenbasis of F.

Shapes: S training sequences, Q queries, B of either at once, T targets, I inputs or O outputs of a layer, i and o of
them after projection, f = i o coordinates of a layer, m of all layers, r vectors of a sketch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.attribution.task import Method, Queries, Task, query_loss
from prism_lightning.attribution.index.quantisation import quantised
from prism_lightning.common.errors import UserError
from prism_lightning.common.files import write_file
from prism_lightning.models import PrismForCausalLM

WHITENING = 0.1  # share of the mean eigenvalue, whatever the damping: evens out coordinates before they are rounded
FIXED = ("input", "output", "values", "fisher")  # tensors of each layer
SKETCH = 4  # vectors per principal component in a sketch of second moments
CHUNK_BYTES = 2**22  # of coordinates in float32, so that they stay in a core's cache until they are multiplied


class GradientIndex(Method):
    """Projected gradients of every training sequence: coordinates in one memory-mapped file.

    Args:
        task, folder: see `Method`.
        bytes_per_sequence: each layer keeps k x k coordinates, or as many rows or columns as it has if these are fewer,
            with the largest k for which all coordinates, and the scale of an int8 row, take at most this.
        modules: attention and MLP layers of the decoder, as in both papers, the head too, or the head alone.
        projection: onto the top eigenvectors of the second moments of inputs and output gradients (LoGra's
            initialisation by PCA), or onto random directions.
        damping: share of the mean eigenvalue of F in each layer; LoGra's by default. May be set between calls of
            `scores`.
        unit_norm: divide every stored gradient by its whitened length, as TrackStar does.
        precision: of the coordinates.
        batch: sequences in a forward and backward pass.
        seed: of random directions and of sketches.

    Raises:
        UserError: not even one coordinate per layer fits.
    """

    def __init__(
        self,
        task: Task,
        folder: Path,
        bytes_per_sequence: int = 8192,
        modules: Literal["layers", "layers+head", "head"] = "layers+head",
        projection: Literal["random", "pca"] = "pca",
        damping: float = 0.1,
        unit_norm: bool = False,
        precision: Literal["fp16", "int8"] = "int8",
        batch: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__(task, folder)
        self.projection, self.damping, self.unit_norm = projection, damping, unit_norm
        self.precision, self.batch, self.seed = precision, batch, seed
        layers = [layer for layer in task.model.backbone.modules() if isinstance(layer, nn.Linear)]
        head: list[nn.Linear] = [task.model.lm_head]
        self.layers = {"layers": layers, "layers+head": layers + head, "head": head}[modules]
        room = (bytes_per_sequence - 2) if precision == "int8" else bytes_per_sequence // 2
        shapes = [(layer.in_features, layer.out_features) for layer in self.layers]
        largest = max(max(shape) for shape in shapes)
        fitting = [k for k in range(1, largest + 1) if sum(min(k, i) * min(k, o) for i, o in shapes) <= room]
        if not fitting:
            raise UserError(f"bytes_per_sequence is {bytes_per_sequence}: {len(shapes)} layers need more")
        self.kept = fitting[-1]

    def fit(self) -> None:
        self.bases = self._principal() if self.projection == "pca" else self._random()
        fisher, gradients = [torch.zeros(1)] * len(self.layers), []
        for ids_BL in self.task.train_SL.split(self.batch):
            parts = self._gradients(Queries.of_sequences(ids_BL))
            fisher = [f_ff + g_Bf.T @ g_Bf for f_ff, g_Bf in zip(fisher, parts, strict=True)]
            gradients.append(torch.cat(parts, dim=1))
        decomposed = [torch.linalg.eigh(f_ff.double() / len(self.task.train_SL)) for f_ff in fisher]
        self.eigenbases = [basis_ff.float() for _, basis_ff in decomposed]
        self.values = [values_f.clamp(min=0).float() for values_f, _ in decomposed]
        whitening_m = self._damped_m(WHITENING).sqrt()
        rows = [quantised((self._rotated(g_Bm) / whitening_m).numpy(), self.precision) for g_Bm in gradients]
        stored = {"coordinates": np.concatenate([rows_Bm for rows_Bm, _ in rows])}
        if self.precision == "int8":
            stored["scales"] = np.concatenate([scales_B for _, scales_B in rows if scales_B is not None])
        write_file(self.folder / "index.safetensors", stored)
        fixed = zip(self.bases, self.values, self.eigenbases, strict=True)
        tensors = {
            f"{number}.{name}": tensor.numpy()
            for number, (sides, values_f, basis_ff) in enumerate(fixed)
            for name, tensor in zip(FIXED, (*sides, values_f, basis_ff), strict=True)
        }
        write_file(self.folder / "fixed.safetensors", tensors)

    def open(self) -> None:
        fixed = load_file(self.folder / "fixed.safetensors")
        inputs, outputs, self.values, self.eigenbases = (
            [fixed[f"{number}.{name}"] for number in range(len(self.layers))] for name in FIXED
        )
        self.bases = list(zip(inputs, outputs, strict=True))
        stored = load_file(self.folder / "index.safetensors")  # memory-mapped: read where it is used
        self.coordinates_Sm = stored["coordinates"]
        self.scales_S = stored["scales"].float() if "scales" in stored else torch.ones(1)
        self.lengths: tuple[float, Tensor] | None = None
        self._factors()

    def scores(self, queries: Queries) -> Tensor:
        starts = range(0, len(queries.ids_QL), self.batch)
        parts = [torch.cat(self._gradients(queries.part(start, start + self.batch)), dim=1) for start in starts]
        whitening_m = self._damped_m(WHITENING).sqrt()  # which the rows were divided by
        queries_Qm = self._rotated(torch.cat(parts)) * whitening_m / self._damped_m(self.damping)
        return torch.cat([queries_Qm @ rows_Cm.T for rows_Cm in self._rows()], dim=1) * self._factors()

    def fixed_bytes(self) -> int:
        """Return the bytes on disk that do not grow with S: projections, eigenvectors and eigenvalues of F, headers."""
        row = self.coordinates_Sm[0].nbytes + (2 if self.coordinates_Sm.dtype == torch.int8 else 0)
        return self.state_bytes() - row * len(self.coordinates_Sm)

    def _factors(self) -> Tensor:
        """Factors [S] or [1] of the products with stored rows."""
        if not self.unit_norm:
            return self.scales_S
        if self.lengths is None or self.lengths[0] != self.damping:
            weights_m = self._damped_m(WHITENING) / self._damped_m(self.damping)
            self.lengths = self.damping, torch.cat([rows_Cm.square() @ weights_m for rows_Cm in self._rows()]).sqrt()
        return 1 / self.lengths[1]  # of rows without their scales, which cancel

    def _rows(self) -> Iterator[Tensor]:
        """Stored rows as float32, some at a time, in one buffer."""
        buffer_Cm = torch.empty(max(1, CHUNK_BYTES // (4 * self.coordinates_Sm.shape[1])), self.coordinates_Sm.shape[1])
        for part_Cm in self.coordinates_Sm.split(len(buffer_Cm)):
            yield buffer_Cm[: len(part_Cm)].copy_(part_Cm)

    def _damped_m(self, damping: float) -> Tensor:
        """Eigenvalues of all layers, each plus a share of its layer's mean."""
        return torch.cat([values_f + damping * values_f.mean() for values_f in self.values])

    def _rotated(self, gradients_Bm: Tensor) -> Tensor:
        """Projected gradients in the eigenbases of F."""
        parts = gradients_Bm.split([len(values_f) for values_f in self.values], dim=1)
        return torch.cat([g_Bf @ basis_ff for g_Bf, basis_ff in zip(parts, self.eigenbases, strict=True)], dim=1)

    def _gradients(self, queries: Queries) -> list[Tensor]:
        """Projected gradients of each sequence's weighted loss, [B, f] per layer."""
        num_targets = int(queries.weights_QT.any(0).nonzero().max()) + 1  # what follows the last target does not matter
        queries = Queries(queries.ids_QL[:, : num_targets + 1], queries.weights_QT[:, :num_targets])
        sides = captured(self.task.model, self.layers, queries)
        return [
            ((delta_BTO @ output_Oo).transpose(1, 2) @ (x_BTI @ input_Ii)).flatten(1)
            for (x_BTI, delta_BTO), (input_Ii, output_Oo) in zip(sides, self.bases, strict=True)
        ]

    def _random(self) -> list[tuple[Tensor, Tensor]]:
        """Random orthonormal directions of inputs and outputs for each layer."""
        generator = torch.Generator().manual_seed(self.seed)
        sizes = [(layer.in_features, layer.out_features) for layer in self.layers]
        draw = [[torch.randn(size, min(size, self.kept), generator=generator) for size in pair] for pair in sizes]
        return [(torch.linalg.qr(input_Ii)[0], torch.linalg.qr(output_Oo)[0]) for input_Ii, output_Oo in draw]

    def _principal(self) -> list[tuple[Tensor, Tensor]]:
        """Top eigenvectors of the second moments of inputs and of output gradients for each layer."""
        generator = torch.Generator().manual_seed(self.seed)
        sizes = [(layer.in_features, layer.out_features) for layer in self.layers]
        sketches = [[MomentSketch(size, min(size, self.kept), generator) for size in pair] for pair in sizes]
        for ids_BL in self.task.train_SL.split(self.batch):
            sides = captured(self.task.model, self.layers, Queries.of_sequences(ids_BL))
            for tensors, pair in zip(sides, sketches, strict=True):
                for sketch, tensor in zip(pair, tensors, strict=True):
                    sketch.add(tensor.flatten(0, 1))
        return [(of_input.top(), of_output.top()) for of_input, of_output in sketches]


def captured(model: PrismForCausalLM, layers: list[nn.Linear], queries: Queries) -> list[tuple[Tensor, Tensor]]:
    """Return inputs x [B, T, I] and output gradients delta [B, T, O] of the summed losses for each layer."""
    captured_by_layer: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def keep(layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        captured_by_layer[layer] = arguments[0].detach(), output

    # The graph begins at the embeddings even where parameters are frozen.
    handles = [model.get_input_embeddings().register_forward_hook(lambda *call: call[2].requires_grad_())]
    handles += [layer.register_forward_hook(keep) for layer in layers]
    try:
        with torch.enable_grad():
            loss = query_loss(model, queries).sum()
    finally:
        for handle in handles:
            handle.remove()
    # Gradients of parameters are not asked for, and so not computed.
    deltas = torch.autograd.grad(loss, [captured_by_layer[layer][1] for layer in layers])
    return [(captured_by_layer[layer][0], delta) for layer, delta in zip(layers, deltas, strict=True)]


class MomentSketch:
    """Leading eigenvectors of A = sum of v v^T over rows v, by Nystrom's approximation from A times r vectors.

    Exact where r reaches the size of v. The head's A would be V x V and cost more than the model itself.
    """

    def __init__(self, size: int, count: int, generator: torch.Generator) -> None:
        width, self.count = min(size, SKETCH * count), count
        self.test_Ir = torch.eye(size) if width == size else torch.randn(size, width, generator=generator)
        self.product_Ir = torch.zeros(size, width)

    def add(self, rows_NI: Tensor) -> None:
        """Add rows to the sum."""
        self.product_Ir += rows_NI.T @ (rows_NI @ self.test_Ir)

    def top(self) -> Tensor:
        """Return orthonormal columns [I, count]."""
        test_Ir, product_Ir = self.test_Ir.double(), self.product_Ir.double()
        product_Ir += 1e-6 * product_Ir.norm() / test_Ir.norm() * test_Ir  # A + shift I, positive definite
        core_rr = test_Ir.T @ product_Ir
        lower_rr = torch.linalg.cholesky((core_rr + core_rr.T) / 2)
        root_Ir = torch.linalg.solve_triangular(lower_rr, product_Ir.T, upper=False).T  # A ~ root root^T
        return torch.linalg.svd(root_Ir, full_matrices=False)[0][:, : self.count].float().contiguous()
