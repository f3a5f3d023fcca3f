"""PyTorch in the benchmark: chunkattn, and all that PyTorch's users would call instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from .. import attention
from . import _memory
from ._bench_case import Case
from ._bench_library import (
    Candidate,
    Gemm,
    Library,
    Way,
    causal_chunks,
    check_memory_efficient,
    memory_efficient,
    nbytes,
    textbook,
)

Array = Any
_BACKENDS = {"flash": "FLASH_ATTENTION", "math": "MATH"}
_CUDA_BACKENDS = {**_BACKENDS, "efficient": "EFFICIENT_ATTENTION", "cudnn": "CUDNN_ATTENTION"}


class Torch(Library):
    """PyTorch on the CPU, whose memory its profiler follows."""

    place = "cpu"
    backends = _BACKENDS

    def __init__(self) -> None:
        import torch

        self.torch: Any = torch

    def candidates(self, case: Case, implementations: tuple[str, ...]) -> Iterator[Candidate]:
        """Yield chunkattn, textbook attention, SDPA in its backends, and what else there is."""
        arrays = self.arrays(case)
        count = 5 if case.backward else 3
        for name in implementations:
            ours = partial(attention, causal=case.causal, implementation=name)
            held = count if name == "standard" else 0
            yield Candidate(name, partial(self._way, case, arrays, ours), True, held)
        yield Candidate("textbook", partial(self._textbook, case, arrays), score_arrays=count)
        sdpa = partial(self._way, case, arrays, self.sdpa(case))
        yield Candidate("sdpa", sdpa)
        for name, backend in self.backends.items():
            make = partial(sdpa, context=partial(self._only, backend))
            yield Candidate(f"sdpa {name}", make, score_arrays=count if name == "math" else 0)
        yield Candidate("flex", partial(self._flex, case, arrays))
        if package := memory_efficient():
            function = package.efficient_dot_product_attention_pt
            make = partial(self._memory_efficient, case, arrays, function)
            yield Candidate("memory-efficient", make)

    def yardstick(self, case: Case) -> Candidate:
        """Return SDPA as the measure for other libraries on the same device."""
        return Candidate("torch sdpa", partial(self._way, case, self.arrays(case), self.sdpa(case)))

    def gemm(self, dtype: str) -> Gemm:
        """Return NumPy's product: one limit for all libraries on the CPU."""
        from ._bench_numpy import NumPy

        return NumPy().gemm(dtype)

    def arrays(self, case: Case) -> dict[str, Array]:
        """Return the case's data in its dtype, ready to be differentiated by."""
        arrays = {
            name: self.torch.from_numpy(x).to(self.place, getattr(self.torch, case.dtype))
            for name, x in case.numbers().items()
        }
        if case.backward:
            for name in ("query", "key", "value"):
                arrays[name].requires_grad_()
        return arrays

    def sdpa(self, case: Case) -> Callable[..., Array]:
        """Return SDPA for this case."""
        return partial(
            self.torch.nn.functional.scaled_dot_product_attention,
            is_causal=case.causal,
            **({"enable_gqa": True} if case.grouped else {}),
        )

    def wait(self, result: Any) -> Any:
        """Return the result once it is there."""
        return result

    def extra_bytes(self, call: Callable[[], Any], like: Array) -> int | None:
        """Return the peak of one call beyond its result."""
        peak, result = _memory.of_torch_cpu(call)
        return peak - nbytes(result)

    def _way(
        self,
        case: Case,
        arrays: dict[str, Array],
        attend: Callable[..., Array],
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        nhd: bool = False,
    ) -> Way:
        *tokens, d_out = arrays.values()
        if nhd:
            tokens, d_out = [_turned(x) for x in tokens], _turned(d_out)

        def call() -> Any:
            out = attend(*tokens)
            if not case.backward:
                return [out]
            for x in tokens:
                x.grad = None
            out.backward(d_out)  # not autograd.grad, which reentrant checkpoints refuse
            return [x.grad for x in tokens]

        def fetch(result: Any) -> list[Array]:
            wide = self.torch.float64 if case.dtype == "float64" else self.torch.float32
            turned = (x.transpose(1, 2) if nhd else x for x in result)
            return [x.detach().to("cpu", wide).numpy() for x in turned]

        def memory() -> int | None:
            for x in tokens:
                x.grad = None  # of earlier calls: it would be given back within this one
            with context():
                return self.extra_bytes(call, d_out)

        return Way(call, fetch, memory, context, self.wait)

    def _visible(self, case: Case) -> Array | None:
        if not case.causal:
            return None
        return self.torch.ones(case.n_q, case.n_k, dtype=bool, device=self.place).tril()

    def _textbook(self, case: Case, arrays: dict[str, Array]) -> Way:
        attend = textbook(self.torch, partial(self.torch.softmax, dim=-1), case)
        return self._way(case, arrays, partial(attend, visible=self._visible(case)))

    def _only(self, backend: str) -> AbstractContextManager[Any]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        only: AbstractContextManager[Any] = sdpa_kernel(getattr(SDPBackend, backend))
        return only

    def _flex(self, case: Case, arrays: dict[str, Array]) -> Way:
        """Return FlexAttention, compiled as its documentation asks for."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        block_mask = None
        if case.causal:
            block_mask = create_block_mask(
                lambda b, h, q_idx, kv_idx: q_idx >= kv_idx,
                None,
                None,
                case.n_q,
                case.n_k,
                device=self.place,
            )
        self.torch.compiler.reset()  # after some cases it would compile no more
        function = self.torch.compile(flex_attention, dynamic=False, fullgraph=True)
        attend = partial(function, block_mask=block_mask, enable_gqa=case.grouped)
        return self._way(case, arrays, attend)

    def _memory_efficient(
        self, case: Case, arrays: dict[str, Array], function: Callable[..., Array]
    ) -> Way:
        check_memory_efficient(case)
        if case.causal:
            arange = partial(self.torch.arange, device=self.place)
            function = partial(function, mask_calc_fn=causal_chunks(arange))
        return self._way(case, arrays, function, nhd=True)


class TorchCuda(Torch):
    """PyTorch on its current GPU."""

    place = "cuda"
    queues = True
    backends = _CUDA_BACKENDS

    def __init__(self) -> None:
        super().__init__()
        if not self.torch.cuda.is_available():
            raise ImportError("PyTorch sees no GPU")
        self.device = f"cuda ({self.torch.cuda.get_device_name()})"

    def gemm(self, dtype: str) -> Gemm:
        """Return a product in the dtype of a size that fills the device."""
        n = 8192
        a, b = (
            self.torch.ones(n, n, dtype=getattr(self.torch, dtype), device=self.place)
            for _ in range(2)
        )
        return Gemm(lambda: a @ b, 2.0 * n**3, self.wait)

    def wait(self, result: Any) -> Any:
        """Return the result once it is there."""
        self.torch.cuda.synchronize()
        return result

    def extra_bytes(self, call: Callable[[], Any], like: Array) -> int | None:
        """Return the peak of the allocator beyond the result."""
        meter = _memory.start(like)
        if meter is None or meter.measure != "allocator":
            return None
        result = self.wait(call())
        return meter.rise() - nbytes(result)

    def free_memory(self) -> int | None:
        """Return the device's free memory."""
        return int(self.torch.cuda.mem_get_info()[0])


def _turned(x: Array) -> Array:
    """Return (1, h, n, d) as (1, n, h, d), contiguous."""
    return x.detach().transpose(1, 2).contiguous().requires_grad_(x.requires_grad)
