"""A GPU that is not there: its tensors have no values, and whatever would wait for them is an error.

Host tensors keep their values and are computed with as ever; tensors of the device are those of torch's FakeTensorMode.
"""

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from unittest import mock

import torch
from accelerate import Accelerator
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)
META = torch.device("meta")  # what autograd takes our device for while `strict`: it has no queues for one that is not there
COPIES = (torch.ops.aten._to_copy, torch.ops.aten.copy_)
HIDDEN = (torch.ops.aten.where, torch.ops.aten.index, torch.ops.aten.index_put_)  # copy numbers of the host too


class PretendedGPU(TorchDispatchMode):
    """Computes on tensors of the device without values. Reading one is torch's own error.

    Attributes:
        copies: tensors that went from the host to the device and back while `strict`.
        strict: whether a copy that the host or the device would wait for is an error; set it once everything is built.
        beside: inside what other threads do, which alone may wait for the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.pinned: dict[int, torch.Tensor] = {}  # by their memory, which they keep from being used again
        self.copies = 0
        self.strict = self.beside = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket
        if func is torch.ops.prim.device.default:
            return META if self.strict else args[0].fake_device
        if name is torch.ops.aten._fused_sgd_:  # has no fake form; it changes nothing that could be seen here
            return None
        if self.strict and kwargs.get("device") == META:
            kwargs = {**kwargs, "device": GPU}
        if name in (torch.ops.aten.is_pinned, torch.ops.aten._pin_memory):
            return self._pin(args[0]) if name is torch.ops.aten._pin_memory else self._is_pinned(args[0])
        if kwargs.pop("pin_memory", None):
            return self._pin(func(*args, **kwargs))
        leaves = tree_leaves((args, kwargs))
        if not any(isinstance(leaf, FakeTensor) or (isinstance(leaf, torch.device) and leaf.type == "cuda") for leaf in leaves):
            return func(*args, **kwargs)
        if name in COPIES:
            source, target = (args[1], args[0]) if name is torch.ops.aten.copy_ else (args[0], kwargs)
            if self._crosses(source, target):
                return self._copy(func, args, kwargs)
        # Numbers of the host are arguments of kernels; all else of it, and any condition or index, is copied and waited for.
        host = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor)]
        if self.strict and host:
            assert name not in HIDDEN and not any(tensor.ndim for tensor in host), f"{func} hides a blocking copy of {host}"
        with self.fake:
            return func(*args, **kwargs)

    def _crosses(self, source, target) -> bool:
        to = target.device if isinstance(target, torch.Tensor) else target.get("device")
        return to is not None and to.type != source.device.type

    def _copy(self, func, args, kwargs):
        """A copy between host and device: asynchronous, and the host's memory pinned, or an error."""
        host = next((a for a in args if isinstance(a, torch.Tensor) and not isinstance(a, FakeTensor)), None)
        asynchronous = kwargs.get("non_blocking") or (func.overloadpacket is torch.ops.aten.copy_ and args[2:] == (True,))
        if self.strict:
            self.copies += 1
            assert host is not None or self.beside, f"the host waits for a tensor of the device {tuple(args[0].shape)}"
            assert host is None or asynchronous, f"a blocking copy of {tuple(host.shape)} {host.dtype}"
            assert host is None or self._is_pinned(host), f"a copy of {tuple(host.shape)} {host.dtype}, which is not pinned"
        if host is args[0] and func.overloadpacket is torch.ops.aten.copy_:  # from the device: there is nothing to see
            return host.zero_()
        if host is None:
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        with self.fake:
            return func(*args, **kwargs)

    def _pin(self, tensor):
        pinned = tensor.clone()
        self.pinned[pinned.untyped_storage().data_ptr()] = pinned
        return pinned

    def _is_pinned(self, tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.pinned

    def submit(self, function, *arguments) -> Future:
        """Stands in for a thread pool's: modes of dispatch hold for the thread alone that enters them."""
        future: Future = Future()
        self.beside = True
        future.set_result(function(*arguments))
        self.beside = False
        return future


@contextmanager
def pretended_gpu() -> Iterator[PretendedGPU]:
    """Everything inside runs on a GPU that is not there: accelerate's device, streams and events too."""
    nothing = {name: mock.MagicMock() for name in ("Stream", "Event", "current_stream")}
    if not torch.cuda.is_available():
        nothing["_lazy_init"] = mock.MagicMock()
    gpu = PretendedGPU()
    with (
        mock.patch.multiple(torch.cuda, stream=lambda stream: nullcontext(), **nothing),
        mock.patch.object(torch.Tensor, "record_stream", lambda tensor, stream: None),
        mock.patch.object(Accelerator, "device", GPU),
        mock.patch("tim.data.prefetch.ThreadPoolExecutor", return_value=mock.Mock(submit=gpu.submit)),
        torch.autograd.set_multithreading_enabled(False),
        gpu,
    ):
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=GPU) as a copy that can be seen
        try:
            yield gpu
        finally:
            torch._C._set_only_lift_cpu_tensors(before)
