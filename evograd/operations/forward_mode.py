"""Forward mode under reverse mode, exact: PyTorch's formulas where they are right, others in place of them, or a refusal.

What torch.func.jvp makes is differentiated in reverse mode by λ. That is right where each formula of forward mode is made of
differentiable operations on its inputs, and some are not: ROWS lists them. `Replacing` sees Python's names of the operations
(torch.det, Tensor.det, torch.linalg.det), and computes them otherwise. What has got past it (in TorchScript, by other names)
has left its node in the graph to λ, and is refused by that.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache, reduce
from typing import NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten
from torch.utils.hooks import BackwardHook

from .threads import Shared, replaced


def directional(
    function: Callable, primals: dict[str, Tensor], tangents: dict[str, Tensor], model: nn.Module | None = None
) -> tuple[Tensor, Tensor]:
    """(function(primals), its derivative along the tangents), to be differentiated further in reverse mode.

    model: what function calls, to see whether there is TorchScript in it that was loaded from a file.
    """
    # torch.func.jvp, not forward_ad's dual numbers: these overwrite log_softmax's values, which the backward pass needs.
    first = torch.zeros((), requires_grad=True).view(()).grad_fn._sequence_nr()
    replacing = Replacing()
    looking = Unseen(replacing) if scripted(model) else None
    hooks = replaced((BackwardHook, "_apply_on_tensors", _without_hooks))
    with looking or nullcontext(), _no_inference, replacing, hooks:
        value, slope = torch.func.jvp(function, (primals,), (tangents,))
    if looking and looking.found:
        raise unseen(*looking.found)
    for node in nodes(_functions([value, slope])):
        if node._sequence_nr() < first or "evograd" in node.metadata:
            continue  # of a graph from before, to which forward mode had no part, or known to be right
        name, row = _BY_NODE.get(node.name().partition("Backward")[0], (None, None))
        if row and (row.value is None or row.value in (getattr(node, "_saved_training", 0), getattr(node, "_saved_reduce", 0))):
            raise unseen(name, row)
    return value, slope


def unseen(name: str, row: Row) -> NotImplementedError:
    return NotImplementedError(
        f"mixed_mode cannot take {name} in forward mode where it is called in this way (from TorchScript, say): {row}; "
        "call it as a function of torch or Tensor in Python, or use evograd.guided, which needs no formula"
    )


PLAIN = (
    "use its plain form (eager attention or SDPBackend.MATH instead of fused attention, broadcast differences instead of cdist)"
)
NESTED = "where nested tensors cannot be used: {error}"
# Words of PyTorch's error, what it means, and a way out beside evograd.guided; in the order in which they are looked for.
LIMITS = (
    ("Trying to use forward AD with", "and an operation in it has no formula for that: {error}", PLAIN),
    ("does not currently support double backward", "and a compiled module is differentiated only once", "take it uncompiled"),
    ("must override the setup_context", "and an autograd.Function in it has no setup_context", "give it that and a jvp"),
    ("You need to implement the jvp function", "and an autograd.Function in it has no jvp", "give it one"),
    ("mutating directly with `.data`", "where tensor.data cannot be assigned to", "compute with the new values instead"),
    ("would mutate a captured Tensor", "where a tensor from outside of it cannot be written into", "make it a new tensor"),
    ("doesn't have storage", "where an operation in it cannot read a tensor's memory: {error}", "leave it out"),
    ("storage of TensorWrapper", "where an operation in it cannot read a tensor's memory: {error}", "leave it out"),
    ("tensors do not have strides", "where sparse tensors cannot be used: {error}", "make them dense"),
    ("NestedTensor does not support", NESTED, "take their parts before the first layer (unbind())"),
    ("NestedIntNode", NESTED, "take their parts before the first layer (unbind())"),
    ("derivative for", "and the formula of an operation in it cannot be differentiated again: {error}", PLAIN),
    ("functorch", "where this cannot be done: {error}", "leave it out"),
)


@contextmanager
def explained() -> Iterator[None]:
    """What cannot be taken in forward mode is a NotImplementedError of one sentence, whatever PyTorch makes of it."""
    try:
        yield
    except (RuntimeError, AttributeError) as error:
        for words, what, way_out in LIMITS:
            if words in str(error):
                what = what.format(error=str(error).splitlines()[0].rstrip("."))
                raise NotImplementedError(
                    f"mixed_mode takes train_loss in forward mode, {what}; {way_out}, or use evograd.guided, which needs no "
                    "formula"
                ) from error
        raise


class Replacing(TorchFunctionMode):
    """Within it, operations of ROWS are computed in their rows' form, where the row says so.

    Where λ enters after an operation PyTorch's own formula is right, mostly, and cheaper. Running statistics are not updated:
    the model runs on copies that are thrown away. Where gradients are off tangents are off too.
    """

    def __init__(self):
        super().__init__()
        self.within = []
        self.depth = 0  # of operations of ROWS
        self.off = False  # tangents are, by `follow`

    def follow(self) -> None:
        """What is a constant to reverse mode is one to forward mode, whoever has switched gradients off."""
        on = torch.is_grad_enabled()
        if self.off if on else torch._C._is_fwd_grad_enabled():
            torch._C._set_fwd_grad_enabled(on)
            self.off = not on

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch._C._set_grad_enabled:
            function(*args)
            return self.follow()  # at once: what follows may be TorchScript, which nothing here sees
        kwargs = kwargs or {}
        if (form := _OF_REVERSE_MODE.get(function)) and torch._C._functorch.maybe_current_level() == 1:
            return form(*args, **kwargs)
        if kwargs.get("requires_grad"):  # of a tensor that is made here
            return tracked(function(*args, **kwargs))
        row = _BY_FUNCTION.get(function)
        if row is None:
            body = None if function in self.within else _body(function)
            if body is None:
                return function(*args, **kwargs)
            self.within.append(function)
            try:
                with self:
                    return body(*args, **kwargs)
            finally:
                self.within.pop()
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        starts = _functions(tensors)
        self.depth += 1
        try:
            result = row.form(function, *args, **kwargs) if kwargs.get("out") is None and row.when(tensors) else None
            if result is None:
                result = function(*args, **kwargs)
        finally:
            self.depth -= 1
        for node in nodes(_functions(result), starts):
            node.metadata["evograd"] = "right"
        return result


def _entered(self: torch.inference_mode) -> None:
    """As no_grad in forward mode, whose tensors cannot be those of inference mode."""
    if any(isinstance(mode, Replacing) for mode in _get_current_function_mode_stack()):
        self._inference_mode_context = torch.set_grad_enabled(not self.mode)
    else:
        _enter(self)


_enter = torch.inference_mode.__enter__
_no_inference = Shared(lambda: replaced((torch.inference_mode, "__enter__", _entered)))


class Unseen(TorchDispatchMode):
    """Finds what gets past `Replacing` and leaves no node in the graph to λ: where λ enters after it, or where it only draws.

    found: name and row of the first. An error that is raised here would lose its words in TorchScript.
    """

    def __init__(self, replacing: Replacing):
        super().__init__()
        self.replacing, self.found = replacing, None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        row = None if self.replacing.depth else WRONG_THEN_TOO.get(name)
        if row and (row.value is None or row.value in (*args, *(kwargs or {}).values())):
            self.found = self.found or (name, row)
        if not self.replacing.depth and str(function) == "aten.bernoulli.p":  # what functorch makes of a dropout's bernoulli_
            self.found = self.found or ("dropout", _BY_FUNCTION[torch.dropout])
        return function(*args, **(kwargs or {}))


def scripted(model: nn.Module | None) -> bool:
    """Whether there is TorchScript, made in this process or loaded, that `Unseen` has to look at: to look takes time."""
    if model is not None and any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        return True
    functions = torch.jit._state._python_cu.get_functions()
    return _may_hide(len(functions)) or bool(torch.jit._recursive.concrete_type_store.type_store)


@lru_cache(maxsize=1)
def _may_hide(n_functions: int) -> bool:
    functions = torch.jit._state._python_cu.get_functions()
    names = [f"aten::{name}(" for name in (*WRONG_THEN_TOO, "bernoulli_")] + ["dropout("]
    return any(name in graph for graph in (str(f.inlined_graph) for f in functions) for name in names)


def _body(function: Callable) -> Callable | None:
    """A function of Python's whose operations a mode is to see too, without the question whether a mode sees itself."""
    if not isinstance(function, types.FunctionType):
        return None
    asks = [n for n in function.__code__.co_names if n.startswith("has_torch_function") and n in function.__globals__]
    if not asks:
        return None
    scope = {**function.__globals__, **dict.fromkeys(asks, lambda *_: False)}
    body = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


# --- the graph to λ -------------------------------------------------------------------------------------------------------


def nodes(ends: list[torch.autograd.graph.Node], starts: list[torch.autograd.graph.Node] = ()) -> Iterator:
    """The nodes of a graph from its ends back to its starts, without these, each once."""
    waiting, seen = list(ends), set(starts)
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            yield node
            waiting += [before for before, _ in node.next_functions if before is not None]


def leaves(end: torch.autograd.graph.Node) -> list[Tensor]:
    """The tensors that a graph begins at. It is looked through at every loss, so that only ends are asked for them."""
    waiting, seen, found = [end], {end}, []
    while waiting:
        node = waiting.pop()
        before = node.next_functions
        if not before:
            found.append(getattr(node, "variable", None))
        for other, _ in before:
            if other is not None and other not in seen:
                seen.add(other)
                waiting.append(other)
    return [leaf for leaf in found if leaf is not None]


def _functions(value) -> list[torch.autograd.graph.Node]:
    """The nodes that the tensors in `value`, and their tangents, have come from."""
    tensors = [t for t in tree_leaves(value) if isinstance(t, Tensor)]
    tensors += [tangent for tangent in map(_tangent, tensors) if tangent is not None]
    return [node for node in (bare(t).grad_fn for t in tensors) if node is not None]


# --- of one tensor --------------------------------------------------------------------------------------------------------


def bare(value: Tensor) -> Tensor:
    """The tensor that forward mode has wrapped."""
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value


def _tangent(value: Tensor) -> Tensor | None:
    if not torch._C._functorch.is_functorch_wrapped_tensor(value) or not (value.is_floating_point() or value.is_complex()):
        return None
    tangent = forward_ad.unpack_dual(value).tangent
    return None if tangent is None or bare(tangent)._is_zerotensor() else tangent


def tangents(values: list[Tensor]) -> bool:
    """The result has a tangent."""
    return torch.is_grad_enabled() and any(_tangent(value) is not None for value in values)


def traced_tangents(values: list[Tensor]) -> bool:
    """The result has a tangent, and reverse mode will go through it. Inside of torch.func.jvp a tensor says no itself."""
    return tangents(values) and any(bare(value).requires_grad for value in values)


def wrapped(values: list[Tensor]) -> bool:
    """Forward mode has a part in it, be it only that it is another kind of tensor."""
    return any(torch._C._functorch.is_functorch_wrapped_tensor(value) for value in values)


def without_gradients(values: list[Tensor]) -> bool:
    """What comes of them is a constant, and no operation's own formula is asked."""
    return not torch.is_grad_enabled() and wrapped(values)


# --- other forms ----------------------------------------------------------------------------------------------------------


def by_reverse(function: Callable, *args, **kwargs):
    """function(*args), and the tangents of its results by two backward passes: the derivative of u ↦ Jᵀu along ẋ is J ẋ.

    The operation itself runs on plain tensors, as it does outside of forward mode: its random numbers are the same too.
    """
    interpreter, inputs = retrieve_current_functorch_interpreter(), {}
    flat, structure = tree_flatten((args, kwargs))
    for i, value in enumerate(flat):
        if isinstance(value, Tensor):
            tangent, flat[i] = _tangent(value) if torch.is_grad_enabled() else None, bare(value)
            if tangent is not None:
                inputs[i] = bare(tangent)
    traced = any(t.requires_grad for t in (*flat, *inputs.values()) if isinstance(t, Tensor))
    pushed = {}
    with interpreter.lower():
        for i in inputs:  # an alias of each, as the same tensor may be given twice
            flat[i] = flat[i].view_as(flat[i]) if flat[i].requires_grad else flat[i].detach().requires_grad_()
        args, kwargs = tree_unflatten(flat, structure)
        outputs, structure = tree_flatten(function(*args, **kwargs))
        smooth = [j for j, y in enumerate(outputs) if isinstance(y, Tensor) and y.requires_grad]
        if smooth and inputs:
            y = [outputs[j] for j in smooth]
            u = [torch.zeros_like(t).requires_grad_() for t in y]
            pulled = torch.autograd.grad(y, [flat[i] for i in inputs], u, create_graph=True, allow_unused=True)
            pairs = [(g, x_t) for g, x_t in zip(pulled, inputs.values()) if g is not None and g.requires_grad]
            if pairs:
                g, x_t = zip(*pairs)
                pushed = dict(zip(smooth, torch.autograd.grad(g, u, x_t, create_graph=traced, allow_unused=True)))
        if not traced:
            outputs = [y.detach() if isinstance(y, Tensor) else y for y in outputs]
    return tree_unflatten([_dual(y, pushed.get(j), interpreter.level()) for j, y in enumerate(outputs)], structure)


def gradient(outputs, inputs, grad_outputs=None, retain_graph=None, create_graph=False, **options) -> tuple:
    """torch.autograd.grad in a loss: the gradient Jᵀv of u by x, and its tangent Jᵀv̇ + ∂⟨v, u̇⟩/∂x at ẋ held fixed.

    Values have a graph from where something requires grad, and so have their tangents. Without create_graph it is a constant.
    """
    interpreter = retrieve_current_functorch_interpreter()
    outputs, inputs = ([t] if isinstance(t, Tensor) else list(t) for t in (outputs, inputs))
    weights = grad_outputs if isinstance(grad_outputs, (list, tuple)) else [grad_outputs] * len(outputs)
    for t in inputs:
        if not bare(t).requires_grad:
            raise NotImplementedError(NO_GRAPH.format(shape=tuple(t.shape)))
    before = set(nodes(_functions([outputs, inputs, weights])))
    u, x, v = ([None if t is None else bare(t) for t in tensors] for tensors in (outputs, inputs, weights))
    u_t, x_t, v_t = ([None if t is None else _tangent(t) for t in tensors] for tensors in (outputs, inputs, weights))
    u_t, x_t = ([None if t is None or not bare(t).requires_grad else bare(t) for t in tensors] for tensors in (u_t, x_t))
    again = dict(create_graph=True, allow_unused=True, is_grads_batched=options.get("is_grads_batched", False))
    with interpreter.lower():
        found = torch.autograd.grad(u, x, v, create_graph or retain_graph, create_graph, **options)
        terms = [(t, torch.ones_like(t) if w is None else w) for t, w in zip(u_t, v) if t is not None]
        terms += [(t, bare(w)) for t, w in zip(u, v_t) if w is not None]
        if not create_graph or not terms:
            return found
        moved = [i for i, t in enumerate(x_t) if t is not None]
        of, along = zip(*terms)
        by = torch.autograd.grad(of, [*x, *(x_t[i] for i in moved)], along, **again)
        pushed = list(by[: len(x)])
        for i, through in zip(moved, by[len(x) :]):  # ẋ may be made of x (tanh, exp), which is no part of this
            own = None if through is None else torch.autograd.grad(x_t[i], x[i], through, **again)[0]
            pushed[i] = pushed[i] if own is None else pushed[i] - own
    level = interpreter.level()
    result = tuple(None if g is None else _dual(g, t, level) for g, t in zip(found, pushed))
    for node in nodes(_functions(result), before):
        node.metadata["evograd"] = "right"
    return result


NO_GRAPH = (
    "mixed_mode takes train_loss in forward mode, where the gradient in it by a tensor of shape {shape} has no graph: one by the "
    "model's parameters is for evograd.baselines.unrolled; for one by what the model computes call requires_grad_() on that before "
    "it is used, or use evograd.guided"
)


def tracked(x: Tensor, requires_grad: bool = True) -> Tensor:
    """requires_grad_() in a loss, of the value that forward mode has wrapped."""
    with retrieve_current_functorch_interpreter().lower():
        bare(x).requires_grad_(requires_grad)
    return x


def is_tracked(x: Tensor) -> bool:
    """requires_grad, as it is outside of forward mode."""
    return bare(x).requires_grad or _tangent(x) is not None


def hook(x: Tensor, function: Callable):
    """register_hook in a loss. One that would change the gradient by θ is not heeded in forward mode."""
    if _tangent(x) is not None:
        raise NotImplementedError(
            "mixed_mode takes train_loss in forward mode, which does not call the hooks of a tensor (register_hook), and they may "
            "change its gradient; leave them out, or use evograd.guided, which calls them"
        )
    with retrieve_current_functorch_interpreter().lower():
        return bare(x).register_hook(function)


_apply = BackwardHook._apply_on_tensors


def _without_hooks(hook: BackwardHook, function: Callable, args: tuple):
    """Modules' backward hooks: as where nothing requires grad. Their function has no formula of forward mode."""
    return (args, None) if wrapped([t for t in args if isinstance(t, Tensor)]) else _apply(hook, function, args)


def backward(*args, **kwargs):
    raise NotImplementedError(
        "mixed_mode takes train_loss in forward mode, where backward() in it cannot be followed; call torch.autograd.grad, or use "
        "evograd.guided"
    )


def _dual(value, tangent: Tensor | None, level: int):
    if not isinstance(value, Tensor):
        return value
    value = torch._C._functorch._wrap_for_grad(value, level)  # integers too, for a loss may write into them
    return value if tangent is None else forward_ad.make_dual(value, torch._C._functorch._wrap_for_grad(tangent, level))


def in_place_of(other: Callable) -> Callable:
    """The form of an operation in place: `other`, which is not, on a copy, and its result copied back."""
    return lambda _, x, *args, **kwargs: x.copy_(by_reverse(other, x.clone(), *args, **kwargs))


def if_given(value: object) -> Callable:
    """by_reverse where `value` is among the arguments, PyTorch's own formula where it is not."""

    def form(function, *args, **kwargs):
        given = any(type(a) is type(value) and a == value for a in (*args, *kwargs.values()))
        return by_reverse(function, *args, **kwargs) if given else None

    return form


def attention(function, *args, **kwargs):
    dropout = args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)
    return by_reverse(function, *args, **kwargs) if dropout > 0 else None


def recurrent(function, *args):
    """Never fused: those kernels have no formula. Packed sequences, and dropout between layers, by reverse."""
    packed = isinstance(args[1], Tensor) and not args[1].is_floating_point()
    dropout, training = args[-3:-1] if packed else args[-4:-2]
    with _unfused:
        return by_reverse(function, *args) if packed or (dropout and training) else function(*args)


@Shared
@contextmanager
def _unfused() -> Iterator[None]:
    before = torch.backends.mkldnn.set_flags(False)[0]
    try:
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch.backends.mkldnn.set_flags(before)


def on_the_host(function, x, *args, **kwargs):
    """numpy() or a deep copy, of values alone: through these PyTorch differentiates in no mode."""
    if _tangent(x) is not None or bare(x).requires_grad:
        raise RuntimeError("numpy() or a deep copy of a tensor that requires grad; use tensor.detach() first")
    return of_values(function, x, *args, **kwargs)


def of_values(function, x, *args, **kwargs):
    with retrieve_current_functorch_interpreter().lower():
        return function(bare(x), *args, **kwargs)


def of_constants(function, *args, **kwargs):
    args, kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
    return function(*args, **kwargs)


def log_cumulative(function, x, dim, **options):
    """log Σ_{j ≤ i} exp x_j by doubling, with log(eᵃ + eᵇ) = a − log σ(a − b)."""
    if x.is_complex() or x.ndim == 0 or options:
        return by_reverse(function, x, dim, **options)
    y, shift = x.movedim(dim, -1), 1
    while shift < y.shape[-1]:
        later, earlier = y[..., shift:], y[..., :-shift]
        y, shift = torch.cat([y[..., :shift], later - F.logsigmoid(later - earlier)], -1), 2 * shift
    return y.movedim(-1, dim)


def triangular(_, input, A, upper=True, transpose=False, unitriangular=False):
    x = torch.linalg.solve_triangular(A.mT if transpose else A, input, upper=upper != transpose, unitriangular=unitriangular)
    return torch.return_types.triangular_solve((x, A.clone()))


def least_and_largest(_, x, *, dim=None, keepdim=False):
    dims = list(range(x.ndim)) if dim is None else dim
    return torch.return_types.aminmax((x.amin(dims, keepdim), x.amax(dims, keepdim)))


def whole(function, *args, **kwargs):
    """linear_cross_entropy, not in chunks."""
    return _body(function)(*args, **{**kwargs, "options": None})


def glu(_, x, dim=-1):
    a, b = x.chunk(2, dim)
    return a * b.sigmoid()


def _batch_norm(_, x, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled):
    if not training and running_mean is not None:
        return None  # statistics that are constants: PyTorch's own formula is right
    if not tangents([p for p in (x, weight, bias) if p is not None]):  # but running ones, from outside, cannot be written into
        return torch.batch_norm(x, weight, bias, None, None, True, momentum, eps, cudnn_enabled)
    return _normalized(x, [0, *range(2, x.ndim)], eps, *(_by_channel(p, x) for p in (weight, bias)))


def _instance_norm(_, x, weight, bias, running_mean, running_var, use_input_stats, momentum, eps, cudnn_enabled):
    if not use_input_stats:
        return None
    return _normalized(x, list(range(2, x.ndim)), eps, *(_by_channel(p, x) for p in (weight, bias)))


def _layer_norm(_, x, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
    return _normalized(x, list(range(-len(normalized_shape), 0)), eps, weight, bias)


def _rms_norm(_, x, normalized_shape, weight=None, eps=None):
    square = (x * x).mean(list(range(-len(normalized_shape), 0)), keepdim=True)
    y = x * (square + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt()
    return y if weight is None else y * weight


def _by_channel(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.view(1, -1, *[1] * (x.ndim - 2))


def _normalized(x: Tensor, dims: list[int], eps: float, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """In plain operations where λ enters before it; with less memory where it does not."""
    in_a_graph = any(p is not None and bare(p).requires_grad for p in (x, weight, bias))
    return (_written_out if in_a_graph else _Lean.apply)(x, dims, eps, weight, bias)


def _written_out(x: Tensor, dims: list[int], eps: float, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """(x − mean) / √(var + eps) · weight + bias. Of x's size, autograd keeps x − mean and its tangent, and nothing else."""
    centred = x - x.mean(dims, keepdim=True)
    scale = ((centred * centred).mean(dims, keepdim=True) + eps).rsqrt()
    if weight is not None and weight.shape[0] == 1:  # one number a channel; a layer's are of x's own size
        scale, weight = scale * weight, None
    y = centred * scale
    if weight is not None:
        y = y * weight
    return y if bias is None else y + bias


class _Lean(torch.autograd.Function):
    """The same where no graph to λ passes: forward mode alone, with one tensor of x's size beside values and tangents.

    PyTorch's own formula makes up to nine of them, and a network's first normalisation may be its largest tensor.
    """

    @staticmethod
    def forward(x, dims, eps, weight, bias):
        var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
        y = x.sub(mean).mul_((var + eps).rsqrt())
        y = y if weight is None else y.mul_(weight)
        return y if bias is None else y.add_(bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.dims, ctx.eps, weight, _ = inputs
        ctx.save_for_forward(x, weight)

    @staticmethod
    def jvp(ctx, x_t, _dims, _eps, weight_t, bias_t):
        """With d = x − mean and s = 1/√(var + eps): (s (x' − mean') − s³ d ⟨d, x'⟩ / n) · weight + s d · weight' + bias'."""
        x, weight = ctx.saved_tensors
        var, mean = torch.var_mean(x, ctx.dims, correction=0, keepdim=True)
        scale, centred = (var + ctx.eps).rsqrt(), x - mean
        y_t = x_t * scale
        y_t.addcmul_(centred, (centred * x_t).mean(ctx.dims, keepdim=True) * scale**3, value=-1)
        y_t.sub_(x_t.mean(ctx.dims, keepdim=True) * scale)
        if weight is not None:
            y_t.mul_(weight)
            if weight_t is not None:
                y_t.addcmul_(centred.mul_(scale), weight_t)
        return y_t if bias_t is None else y_t.add_(bias_t)


# --- the table ------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """An operation that forward mode has not right.

    names: what Python calls it, within torch.
    form: what is computed in its place, form(function, *args, **kwargs); if that is None, PyTorch's own formula is used.
    when: of its tensors, whether the form is taken.
    wrong: what is.
    aten: what its node is named after, which must not be in the graph to λ unseen.
    value: what the node has saved in that case, if it matters.
    issue: PyTorch's number, where known.
    """

    names: str
    form: Callable
    when: Callable[[list[Tensor]], bool]
    wrong: str
    aten: str = ""
    value: object = None
    issue: int | None = None

    def __str__(self) -> str:
        return self.wrong + (f" (pytorch issue {self.issue})" if self.issue else "")


STATISTICS = "its formula takes the statistics for constants, so that its derivative in reverse mode is wrong"
FACTORS = "its formula takes the LU factors for constants, so that its derivative in reverse mode is wrong"
DRAWS = "it draws in another order where its input is not contiguous"
NO_FORMULA = "it has no formula"
NO_STORAGE = "it reads memory that a tensor of forward mode has not"
ROWS = (
    Row("layer_norm", _layer_norm, tangents, STATISTICS, "native_layer_norm", issue=196700),
    Row("instance_norm", _instance_norm, tangents, STATISTICS, issue=196699),
    Row(
        "batch_norm",
        _batch_norm,
        wrapped,
        STATISTICS,
        "native_batch_norm _native_batch_norm_legit cudnn_batch_norm miopen_batch_norm",
        True,
        196699,
    ),
    Row("", by_reverse, traced_tangents, STATISTICS, "_batch_norm_with_update", issue=196699),
    Row("rms_norm", _rms_norm, traced_tangents, "its fused kernel saves statistics", "_fused_rms_norm"),
    Row(
        "linalg.solve linalg.solve_ex linalg.tensorsolve",
        by_reverse,
        traced_tangents,
        FACTORS,
        "_linalg_solve_ex",
        issue=196695,
    ),
    Row("linalg.eig linalg.eigvals", by_reverse, traced_tangents, "its formula solves by the eigenvectors"),
    Row("det Tensor.det linalg.det", by_reverse, traced_tangents, FACTORS, "_linalg_det", issue=196696),
    Row(
        "slogdet Tensor.slogdet linalg.slogdet logdet Tensor.logdet",
        by_reverse,
        traced_tangents,
        FACTORS,
        "_linalg_slogdet",
        issue=196697,
    ),
    Row(
        "linalg.householder_product orgqr Tensor.orgqr",
        by_reverse,
        traced_tangents,
        "its formula loses a term of second order",
        "linalg_householder_product",
        issue=196698,
    ),
    Row(
        "linalg.eigh linalg.eigvalsh linalg.matrix_sqrth linalg.polar",
        by_reverse,
        traced_tangents,
        "its formula divides by zero in reverse mode",
        "_linalg_eigh",
    ),
    Row(
        "cholesky_inverse Tensor.cholesky_inverse",
        by_reverse,
        tangents,
        "its formula has factors in the wrong order",
        "cholesky_inverse",
        issue=196682,
    ),
    Row(
        "cholesky_solve Tensor.cholesky_solve",
        by_reverse,
        tangents,
        "its formula has factors in the wrong order",
        "cholesky_solve",
        issue=196694,
    ),
    Row(
        "triangular_solve Tensor.triangular_solve",
        triangular,
        tangents,
        "its formula heeds neither which triangle of the matrix counts nor transpose",
        "triangular_solve",
    ),
    Row(
        "logcumsumexp Tensor.logcumsumexp",
        log_cumulative,
        tangents,
        "its formula underflows where a later term is larger by far",
        "logcumsumexp",
        issue=196705,
    ),
    Row("prod Tensor.prod", by_reverse, traced_tangents, "its formula at zeros calls cumprod"),
    Row(
        "cumprod Tensor.cumprod vander linalg.vander",
        by_reverse,
        traced_tangents,
        "its formula is wrong at zeros",
        "cumprod",
        issue=196701,
    ),
    Row("Tensor.cumprod_", in_place_of(torch.cumprod), traced_tangents, "its formula is wrong at zeros", issue=196701),
    Row(
        "scatter_reduce Tensor.scatter_reduce",
        if_given("prod"),
        tangents,
        "its formula for products takes them for constants",
        "scatter_reduce",
        "prod",
    ),
    Row("nn.functional.linear_cross_entropy", whole, tangents, "in chunks it is taken for a constant"),
    Row("nn.functional.glu", glu, tangents, "its formula has no derivative in reverse mode"),
    Row("aminmax Tensor.aminmax", least_and_largest, tangents, "it writes into tensors of zeros"),
    Row("std Tensor.std std_mean", by_reverse, tangents, "its formula divides by zero where all values are equal"),
    Row("_foreach_norm", by_reverse, tangents, "its formula keeps the dimensions that are summed over"),
    Row("lstm gru rnn_tanh rnn_relu", recurrent, wrapped, NO_FORMULA),
    Row("_pack_padded_sequence _pad_packed_sequence tensor_split Tensor.tensor_split", by_reverse, wrapped, NO_STORAGE),
    Row("Tensor.tolist", of_values, wrapped, NO_STORAGE),
    Row("Tensor.numpy Tensor.__array__ Tensor.__deepcopy__", on_the_host, wrapped, NO_STORAGE),
    Row("dropout feature_dropout alpha_dropout feature_alpha_dropout rrelu", if_given(True), wrapped, DRAWS),
    Row("native_dropout", by_reverse, wrapped, DRAWS),
    Row("dropout_", in_place_of(torch.dropout), wrapped, DRAWS),
    Row("feature_dropout_", in_place_of(torch.feature_dropout), wrapped, DRAWS),
    Row("alpha_dropout_", in_place_of(torch.alpha_dropout), wrapped, DRAWS),
    Row("feature_alpha_dropout_", in_place_of(torch.feature_alpha_dropout), wrapped, DRAWS),
    Row("rrelu_", in_place_of(torch.rrelu), wrapped, DRAWS),
    Row("nn.functional.scaled_dot_product_attention", attention, wrapped, DRAWS),
    Row(
        "_functorch.autograd_function.custom_function_call",
        of_constants,
        without_gradients,
        "its jvp is asked where gradients are off",
    ),
    Row("rand_like randn_like randint_like empty_like bernoulli Tensor.bernoulli normal poisson", by_reverse, wrapped, DRAWS),
)


def _found(path: str):
    """torch's attribute of that path; None in a version that has none."""
    return reduce(lambda place, name: getattr(place, name, None), path.split("."), torch)


_BY_FUNCTION = {_found(name): row for row in ROWS for name in row.names.split() if _found(name) is not None}
_BY_FUNCTION |= {
    getattr(torch.ops.aten, name): row
    for row in ROWS
    for name in row.aten.split()
    if row.wrong is not STATISTICS and hasattr(torch.ops.aten, name)
}
# Packets of the dispatcher's, and their overloads.
_BY_FUNCTION |= {
    getattr(packet, overload): row
    for packet, row in list(_BY_FUNCTION.items())
    if isinstance(packet, torch._ops.OpOverloadPacket)
    for overload in packet.overloads()
    if overload != "out"
}
# Of those with a node's name the ones whose formula is wrong in forward mode already.
WRONG_THEN_TOO = {
    name: row
    for row in ROWS
    for name in row.aten.split()
    if name in ("cholesky_inverse", "cholesky_solve", "triangular_solve", "logcumsumexp", "scatter_reduce")
}
_BY_NODE = {"".join(map(str.capitalize, name.split("_"))): (name, row) for row in ROWS for name in row.aten.split()}
# What a loss does in reverse mode itself.
_OF_REVERSE_MODE = {
    torch.autograd.grad: gradient,
    Tensor.requires_grad_: tracked,
    Tensor.requires_grad.__set__: tracked,
    Tensor.requires_grad.__get__: is_tracked,
    Tensor.register_hook: hook,
    Tensor.backward: backward,
    torch.autograd.backward: backward,
}
