"""What a forward pass keeps for the backward pass, component by component, as JAX's differentiation says it."""

import re
from typing import Any, cast

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


def kept_bytes(function: Any, params: Any, *args: Any) -> dict[str, int]:
    """Bytes by component, of arrays that are neither arguments nor weights.

    Args:
        function: (params, *args) → a loss, whose gradient is for the params. All are shapes.
    """

    def residuals(params: Any, *args: Any) -> Any:
        return jax.vjp(lambda params: function(params, *args), params)[1]

    traced = jax.make_jaxpr(residuals)(params, *args).jaxpr
    kept = {}  # what is handed on unchanged, by several names, is one array
    for var in (x for x in traced.outvars if isinstance(x, Var)):
        scope, key = origin(traced, var)
        if key not in (*traced.invars, *traced.constvars):
            kept[key] = scope, cast(Any, var.aval)
    found = dict.fromkeys((name for _, name in SCOPES), 0)
    for scope, aval in kept.values():
        found[next(name for pattern, name in SCOPES if re.search(pattern, scope))] += aval.size * aval.dtype.itemsize
    return found


def origin(jaxpr: Jaxpr, var: Any) -> tuple[str, Any]:
    """The names of the modules where a variable is computed, and what it is known by; an argument is itself."""
    eqn = next((eqn for eqn in jaxpr.eqns if var in eqn.outvars), None)
    if eqn is None:
        return "", var
    inner, i, scope = eqn.params.get("jaxpr"), eqn.outvars.index(var), str(eqn.source_info.name_stack)
    if inner is None:
        return scope, (id(eqn), i)
    inner = getattr(inner, "jaxpr", inner)
    within, key = origin(inner, inner.outvars[i])
    if isinstance(key, Var) and key in inner.invars:
        return origin(jaxpr, eqn.invars[inner.invars.index(key)])
    return f"{scope}/{within}", (id(eqn), key)
