"""Attention to be touched: a page in which the words under the pointer show what they attend to."""

import json
import uuid
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float

from tx_jax.errors import require

PAGE = """<div id="ID" style="font:14px system-ui,sans-serif;line-height:2">
layer <select></select> head <select></select> <span style="color:#888">point at a word of the first line</span>
<p></p><p></p></div>
<script>
(() => {
  const {weights, queries, keys} = DATA, root = document.getElementById("ID");
  const [layers, heads] = root.querySelectorAll("select"), [above, below] = root.querySelectorAll("p");
  const option = (menu, text) => menu.append(Object.assign(document.createElement("option"), {text}));
  weights.forEach((_, i) => option(layers, i + 1));
  weights[0].forEach((_, i) => option(heads, i + 1));
  option(heads, "mean");
  const words = (line, list) => list.map(text => {
    const word = Object.assign(document.createElement("span"), {textContent: text});
    word.style.cssText = "padding:3px 4px;margin:1px;border-radius:4px;white-space:pre;cursor:default";
    line.append(word);
    return word;
  });
  const asked = words(above, queries), seen = words(below, keys);
  let chosen = queries.length - 1;
  const show = () => {
    const layer = weights[layers.selectedIndex], one = layer[heads.selectedIndex];
    const row = one ? one[chosen] : keys.map((_, s) => layer.reduce((sum, h) => sum + h[chosen][s], 0) / layer.length);
    seen.forEach((word, s) => {
      word.style.background = `rgba(48, 112, 192, ${row[s]})`;
      word.style.color = row[s] > 0.5 ? "#fff" : "inherit";
      word.title = row[s].toFixed(3);
    });
    asked.forEach((word, t) => word.style.outline = t === chosen ? "1px solid #3070c0" : "none");
  };
  asked.forEach((word, t) => word.onmouseenter = () => { chosen = t; show(); });
  layers.onchange = heads.onchange = show;
  show();
})();
</script>
"""


class Page(NamedTuple):
    """HTML that needs nothing from elsewhere; the last value of a notebook's cell is shown as what it says.

    >>> Page("<b>seen</b>")._repr_html_()
    '<b>seen</b>'
    """

    html: str

    def _repr_html_(self) -> str:
        return self.html


def browse(
    weights: Float[Array | np.ndarray, "L N T S"], queries: Sequence[str], keys: Sequence[str] | None = None
) -> Page:
    """Attention by layer and head, a word at a time (keys of None: the queries).

    >>> browse(np.ones((1, 1, 1, 1)), ["a"]).html[:4]
    '<div'

    Raises:
        InputError: there are not as many words as weights.
    """
    keys = queries if keys is None else keys
    check_words(weights, queries, keys)
    data = {"weights": np.asarray(weights, float).round(4).tolist(), "queries": list(queries), "keys": list(keys)}
    text = json.dumps(data).replace("<", "\\u003c")  # a word such as </script> ends nothing
    return Page(PAGE.replace("ID", f"attention-{uuid.uuid4().hex}").replace("DATA", text))


def check_words(weights: Array | np.ndarray, queries: Sequence[str], keys: Sequence[str]) -> None:
    """Hold the words beside (L, N, T, S) weights to their number. Raises as `browse` does."""
    require(weights.ndim == 4, f"weights have shape {weights.shape}, not (L, N, T, S); take one row of the batch")
    words, shape = (len(queries), len(keys)), weights.shape[2:]
    rule = f"{words[0]} queries and {words[1]} keys are not the {shape} of the weights"
    require(words == shape, f"{rule}; give a word for each")
