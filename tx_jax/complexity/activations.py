"""What a forward pass keeps for the backward pass, component by component, as JAX's differentiation says it."""

import re
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, Var

SCOPES = (  # of what was kept: the modules that gave it, as their names stand in a program; the first that is found
    (r"norm", "norms"),
    (r"cross_attention.*heads", "cross-attention scores"),
    (r"cross_attention", "cross-attention projections"),
    (r"attention.*heads", "attention scores"),
    (r"attention", "attention projections"),
    (r"mlp|moe", "feed-forward"),
    (r"blocks_\d+$", "norms"),  # the residual stream
    (r"/head", "head"),
    (r"embed|positions|encode|\.hidden\)$", "embedding"),
    (r"", "head"),  # the loss
)
VIEWS = ("broadcast_in_dim", "expand_dims", "name", "reshape", "squeeze", "transpose")  # what computes nothing


class Origin(NamedTuple):
    """Where an array is computed: equal for two that are one."""

    scope: str  # the names of the modules
    key: Any  # an argument is itself; None: a constant
    aval: Any  # its shape there


def kept_bytes(function: Any, params: Any, *args: Any) -> dict[str, int]:
    """Bytes by component, of arrays that are neither arguments nor weights; of several views of an array, once.

    Args:
        function: (params, *args) → a loss, whose gradient is for the params. All are shapes.
    """

    def residuals(params: Any, *args: Any) -> Any:
        return jax.vjp(lambda params: function(params, *args), params)[1]

    traced = jax.make_jaxpr(residuals)(params, *args).jaxpr
    given = (None, *traced.invars, *traced.constvars)
    kept = {one.key: one for one in (origin(traced, var) for var in traced.outvars) if one.key not in given}
    found = dict.fromkeys((name for _, name in SCOPES), 0)
    for scope, _, aval in kept.values():
        found[next(name for pattern, name in SCOPES if re.search(pattern, scope))] += aval.size * aval.dtype.itemsize
    return found


def origin(jaxpr: Jaxpr, var: Any) -> Origin:
    """That of a variable of a program, or of what it is a view of."""
    if not isinstance(var, Var):
        return Origin("", None, None)
    eqn = next((eqn for eqn in jaxpr.eqns if var in eqn.outvars), None)
    if eqn is None:
        return Origin("", var, var.aval)
    if eqn.primitive.name in VIEWS:
        return origin(jaxpr, eqn.invars[0])
    inner, i, scope = eqn.params.get("jaxpr"), eqn.outvars.index(var), str(eqn.source_info.name_stack)
    if inner is None:
        return Origin(scope, (id(eqn), i), var.aval)
    inner = getattr(inner, "jaxpr", inner)
    within, key, aval = origin(inner, inner.outvars[i])
    if isinstance(key, Var) and key in inner.invars:
        return origin(jaxpr, eqn.invars[inner.invars.index(key)])
    of_all = var.aval if eqn.primitive.name == "scan" else aval  # what a turn gives is kept of all turns
    return Origin(f"{scope}/{within}", None if key is None else (id(eqn), key), of_all)
