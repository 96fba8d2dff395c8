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
    given, found = {*traced.invars, *traced.constvars}, dict.fromkeys((name for _, name in SCOPES), 0)
    for var in {x for x in traced.outvars if isinstance(x, Var)} - given:
        scope = scope_of(traced, var)
        name, aval = next(name for pattern, name in SCOPES if re.search(pattern, scope)), cast(Any, var.aval)
        found[name] += aval.size * aval.dtype.itemsize
    return found


def scope_of(jaxpr: Jaxpr, var: Any) -> str:
    """The names of the modules that a variable comes from, into the programs that its own calls."""
    for eqn in jaxpr.eqns:
        if var in eqn.outvars:
            inner = eqn.params.get("jaxpr")
            inner = getattr(inner, "jaxpr", inner)
            outer = str(eqn.source_info.name_stack)
            return outer if inner is None else f"{outer}/{scope_of(inner, inner.outvars[eqn.outvars.index(var)])}"
    return ""
