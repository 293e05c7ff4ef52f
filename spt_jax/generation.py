"""Text generation by a decoder, token by token over a cache of keys and values.

Prompts are aligned at the right, so that all sequences write the same place of the cache. One
compiled program reads the prompts, another takes up to `SYNC_STEPS` steps on the device before the
host looks at them; both are compiled once for all calls of the same shapes.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from tokenizers import Tokenizer
from tqdm import tqdm

from spt_jax.models.decoder import Cache, Decoder
from spt_jax.models.tokenizer import begun_once

SYNC_STEPS = 16  # decoding steps between two looks at the tokens
PROMPT_MULTIPLE = 16  # widths to which prompts and caches are padded: each compiles once
CACHE_MULTIPLE = 64
ENDS_MULTIPLE = 4  # of end tokens, filled up with ids that do not occur

Ids = list[int]


class Sampler(NamedTuple):
    """How tokens are drawn; what is None is left out.

    Attributes:
        temperature: divisor of the logits; None for the most likely token always.
        top_p: probability that the most likely tokens drawn from have together.
        keys: one random key a row.
    """

    temperature: jax.Array | None
    top_p: jax.Array | None
    keys: jax.Array


class Progress(NamedTuple):
    """All that a step changes.

    Attributes:
        cache: keys and values.
        token: `[B]`, the newest tokens, not read yet.
        done: `[B]`, rows that have ended.
        step: int32, tokens drawn for each row so far.
    """

    cache: Cache
    token: jax.Array
    done: jax.Array
    step: jax.Array


def generate(
    model: nnx.Module,
    prompts: Sequence[str] | Sequence[Sequence[int]] | Int[Array | np.ndarray, "B S"],
    *,
    max_new_tokens: int,
    tokenizer: Tokenizer | None = None,
    attention_mask: Any = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int = 0,
    stop: Sequence[str | Sequence[int]] = (),
    eos_token_ids: Sequence[int] | None = None,
    progress_bar: bool | None = None,
    on_tokens: Callable[[int, Ids], None] | None = None,
    prompt_multiple: int = PROMPT_MULTIPLE,
) -> list[str] | list[Ids]:
    """Continue prompts.

    Sparse attention selects keys as in one sequence as long as the cache: the longest prompt and
    `max_new_tokens`, rounded up. A token being generated has its own keys (the token rule),
    whatever the granularity. With dynamic rotary embeddings the longest row sets the base for all,
    and keys stay rotated as they were. What `generation_config.json` says of sampling is not read.

    Args:
        model: a causal language model, adapted or not; left as it is.
        prompts: texts, lists of token ids, or an array of token ids with `attention_mask`.
        max_new_tokens: tokens after which a row ends in any case.
        tokenizer: the model's; needed where prompts or `stop` hold text. It adds special tokens to
            the prompts as it is set to; a text that begins with its start already, as a rendered
            chat template does, gets no second one.
        attention_mask: `[B, S]`, 0 at padding, at either side; only with an array of ids.
        temperature: divisor of the logits before sampling; 0 takes the most likely token.
        top_p: sample from the fewest most likely tokens with at least this probability together.
        top_k: sample from this many most likely tokens; applied before `top_p`.
        seed: of the sampling. A row's draws depend on it and on the row's number alone.
        stop: texts, special tokens such as "<|im_end|>" among them, and lists of token ids that
            end a row as soon as its new tokens hold one.
        eos_token_ids: tokens that end a row; None for the model's, `()` for none.
        progress_bar: None shows one on a terminal.
        on_tokens: takes the number of a row and its newest tokens, as soon as they are drawn, one
            by one and thus a little slower; those that a text of `stop` takes back included.
        prompt_multiple: prompts are padded to a multiple of it. Each width compiles once, so that
            a conversation, whose prompts grow, wants a large one.

    Returns:
        What each row adds to its prompt, without what ended it: text where prompts are texts, with
        special tokens left out, else token ids.

    Raises:
        ValueError: an argument is out of range or does not go with the others, or a prompt and its
            new tokens are longer than the model's positions.
        NotImplementedError: the model has sparse attention and a window shorter than the cache.

    Example:
        >>> import spt_jax
        >>> model = spt_jax.load_pretrained("my-llama", task="causal-lm")  # doctest: +SKIP
        >>> tokenizer = spt_jax.load_tokenizer("my-llama")  # doctest: +SKIP
        >>> spt_jax.generate(
        ...     model, ["The capital of France is"], max_new_tokens=8, tokenizer=tokenizer
        ... )  # doctest: +SKIP
        [' Paris.']
    """
    if not isinstance(model, Decoder) or model.task != "causal-lm" or model.score is not None:
        raise ValueError(
            'generation needs a causal language model: load_pretrained(..., task="causal-lm") of a '
            "decoder"
        )
    _check_options(max_new_tokens, temperature, top_p, top_k)
    if prompt_multiple < 1:
        raise ValueError(f"prompt_multiple must be at least 1, got {prompt_multiple}")
    texts = not isinstance(prompts, np.ndarray | jax.Array) and any(
        isinstance(prompt, str) for prompt in prompts
    )
    rows = _token_ids(prompts, attention_mask, tokenizer, model.config.vocab_size)
    longest = max(map(len, rows))
    if longest + max_new_tokens > model.config.max_length:
        raise ValueError(
            f"the longest prompt has {longest} tokens, with max_new_tokens={max_new_tokens} "
            f"{longest + max_new_tokens}, but the model's positions serve {model.config.max_length}"
        )
    if isinstance(eos_token_ids, int | np.integer):
        raise ValueError(f"eos_token_ids is {eos_token_ids}; give a list")
    ends = model.config.eos_token_ids if eos_token_ids is None else tuple(eos_token_ids)
    find_stop = _stop_finder(stop, tokenizer, rows)

    width = _round_up(longest, prompt_multiple)
    sync_steps = SYNC_STEPS if on_tokens is None else 1
    ids, mask = np.zeros((2, len(rows), width), np.int32)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = row
        mask[i, width - len(row) :] = 1
    greedy = temperature == 0
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(len(rows)))
    sampler = Sampler(
        None if greedy else jnp.float32(temperature),
        None if greedy or top_p is None or top_p == 1 else jnp.float32(top_p),
        keys,
    )
    graphdef, state = nnx.split(model)
    run = {
        "graphdef": graphdef,
        "state": state,
        "prompt_mask": jnp.asarray(mask != 0),
        "ends": jnp.asarray(ends + (-1,) * (ENDS_MULTIPLE - len(ends) % ENDS_MULTIPLE), jnp.int32),
        "sampler": sampler,
        "top_k": None if greedy or top_k is None else min(top_k, model.config.vocab_size),
    }
    capacity = _round_up(width + max_new_tokens, CACHE_MULTIPLE)
    shown = sys.stderr.isatty() if progress_bar is None else progress_bar
    new: list[Ids] = [[] for _ in rows]
    cut: list[str | None] = [None] * len(rows)
    open_rows = set(range(len(rows)))
    with tqdm(total=len(rows) * max_new_tokens, disable=not shown, unit="token") as bar:
        progress = _prefill(input_ids=jnp.asarray(ids), capacity=capacity, **run)
        tokens = progress.token[:, None]
        while True:
            drawn, done = jax.device_get((tokens, progress.done))
            for i in sorted(open_rows):
                before = len(new[i])
                new[i] += drawn[i].tolist()
                ended = bool(done[i]) or len(new[i]) == max_new_tokens
                at = next((n for n, t in enumerate(new[i][before:], before) if t in ends), None)
                new[i] = new[i][:at]
                bar.update(len(new[i]) - before)
                if on_tokens is not None and len(new[i]) > before:
                    on_tokens(i, new[i][before:])
                if (found := find_stop(i, new[i], before)) is not None:
                    new[i], cut[i] = found
                    ended = True
                if ended:
                    open_rows.remove(i)
            taken = int(progress.step)
            if not open_rows or taken == max_new_tokens:
                break
            closed = np.ones(len(rows), bool)
            closed[list(open_rows)] = False
            progress, tokens = _decode(
                progress=progress._replace(done=jnp.asarray(closed)),
                last_step=jnp.int32(max_new_tokens),
                steps=sync_steps,
                **run,
            )
            tokens = tokens[:, : min(sync_steps, max_new_tokens - taken)]
    if not texts:
        return new
    assert tokenizer is not None
    return [
        _continuation(tokenizer, row, more) if text is None else text
        for row, more, text in zip(rows, new, cut, strict=True)
    ]


def _check_options(
    max_new_tokens: int, temperature: float, top_p: float | None, top_k: int | None
) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be at least 0 and finite, got {temperature}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")


def _token_ids(
    prompts: Any, attention_mask: Any, tokenizer: Tokenizer | None, vocab_size: int
) -> list[Ids]:
    """Ids of each prompt, without padding."""
    if isinstance(prompts, str):
        raise ValueError("prompts is one text; give a list of them")
    is_array = isinstance(prompts, np.ndarray | jax.Array)
    if attention_mask is not None and not is_array:
        raise ValueError("attention_mask goes with an array of token ids; lists need none")
    if not len(prompts):
        raise ValueError("there are no prompts")
    if is_array:
        array = np.asarray(prompts)
        mask = np.ones(array.shape, bool)
        if attention_mask is not None:
            mask = np.asarray(attention_mask) != 0
        if array.ndim != 2 or mask.shape != array.shape:
            raise ValueError(
                "prompts must be [batch, sequence] and attention_mask of that shape, got "
                f"{array.shape} and {mask.shape}"
            )
        if not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"prompts must be token ids, got {array.dtype}")
        rows = [row[valid].tolist() for row, valid in zip(array, mask, strict=True)]
    else:
        rows = [_ids_of_prompt(i, prompt, tokenizer) for i, prompt in enumerate(prompts)]
        if len({isinstance(prompt, str) for prompt in prompts}) == 2:
            raise ValueError("prompts are partly texts and partly token ids; give one kind")
    for i, row in enumerate(rows):
        if not row:
            raise ValueError(f"prompt {i} has no tokens; begin it with the model's bos token")
        if min(row) < 0 or max(row) >= vocab_size:
            raise ValueError(
                f"prompt {i} has token ids from {min(row)} to {max(row)}; the model's vocabulary "
                f"has 0 to {vocab_size - 1}"
            )
    return rows


def _ids_of_prompt(number: int, prompt: Any, tokenizer: Tokenizer | None) -> Ids:
    if not isinstance(prompt, str):
        if not isinstance(prompt, Sequence | np.ndarray | jax.Array) or not all(
            np.ndim(token) == 0 and isinstance(token, int | np.integer | jax.Array)
            for token in prompt
        ):
            raise ValueError(
                f"prompt {number} is {str(prompt)[:60]}; give a text or a list of token ids "
                "(ChatTemplate.render makes a text of messages)"
            )
        return [int(token) for token in prompt]
    if tokenizer is None:
        raise ValueError("prompts are texts: give the model's tokenizer, or token ids")
    encoding = tokenizer.encode(prompt)
    mask = encoding.attention_mask
    return begun_once(
        list(itertools.compress(encoding.ids, mask)),
        list(itertools.compress(encoding.special_tokens_mask, mask)),
    )


StopFinder = Callable[[int, Ids, int], tuple[Ids, str | None] | None]


def _stop_finder(
    stop: Sequence[str | Sequence[int]], tokenizer: Tokenizer | None, prompts: Sequence[Ids]
) -> StopFinder:
    """A function of a row, its new tokens and how many of them were searched before.

    It returns the tokens before the first stop, with their text where the stop is one; None where
    there is no stop.
    """
    if isinstance(stop, str) or not all(isinstance(s, str | Sequence) for s in stop):
        raise ValueError(f"stop must be a list of texts and lists of token ids, got {stop!r}")
    if not all(map(len, stop)):
        raise ValueError("a stop is empty; leave it out")
    texts = [s for s in stop if isinstance(s, str)]
    sequences = [list(s) for s in stop if not isinstance(s, str)]
    if texts and tokenizer is None:
        raise ValueError("stop holds texts: give the model's tokenizer")

    def text_of(row: int, ids: Ids, special: bool = True) -> str:
        assert tokenizer is not None
        return _continuation(tokenizer, prompts[row], ids, special)

    def by_text(row: int, ids: Ids) -> tuple[int, Ids, str] | None:
        if not any(s in text_of(row, ids) for s in texts):
            return None
        grown = [text_of(row, ids[:n]) for n in range(len(ids) + 1)]
        end, text = next((n, t) for n, t in enumerate(grown) if any(s in t for s in texts))
        place = min(text.find(s) for s in texts if s in text)
        kept = max(n for n, t in enumerate(grown[: end + 1]) if len(t) <= place)
        before, after = (text_of(row, ids[:n], special=False) for n in (kept, kept + 1))
        of_cut_token = "" if after == before else text[len(grown[kept]) : place]
        return end, ids[:kept], before + of_cut_token

    def by_ids(ids: Ids, searched: int) -> tuple[int, Ids] | None:
        for end in range(searched + 1, len(ids) + 1):
            lengths = [len(s) for s in sequences if ids[:end][-len(s) :] == s]
            if lengths:
                return end, ids[: end - max(lengths)]
        return None

    def find(row: int, ids: Ids, searched: int) -> tuple[Ids, str | None] | None:
        in_text, in_ids = by_text(row, ids) if texts else None, by_ids(ids, searched)
        if in_text is not None and (in_ids is None or in_text[0] <= in_ids[0]):
            return in_text[1], in_text[2]
        return None if in_ids is None else (in_ids[1], None)

    return find


def _continuation(tokenizer: Tokenizer, prompt: Ids, new: Ids, special: bool = False) -> str:
    """Text that new tokens add to a prompt, special tokens left out unless asked for.

    Tokenizers drop the space before a first word.
    """
    before, both = tokenizer.decode_batch([prompt, prompt + new], skip_special_tokens=not special)
    if both.startswith(before):
        return both[len(before) :]
    return tokenizer.decode(new, skip_special_tokens=not special)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _draw(
    logits: Float[Array, "B V"], sampler: Sampler, top_k: int | None, step: jax.Array
) -> Int[Array, " B"]:
    """One token a row."""
    logits = logits.astype(jnp.float32)
    if sampler.temperature is None:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    logits = logits / sampler.temperature
    order = None
    if top_k is not None or sampler.top_p is not None:
        logits, order = jax.lax.top_k(logits, top_k or logits.shape[-1])
    if sampler.top_p is not None:
        probabilities = jax.nn.softmax(logits)
        before = jnp.cumsum(probabilities, -1) - probabilities
        kept = (before < sampler.top_p).at[:, 0].set(True)
        logits = jnp.where(kept, logits, -jnp.inf)
    keys = jax.vmap(jax.random.fold_in, (0, None))(sampler.keys, step)
    chosen = jax.vmap(jax.random.categorical)(keys, logits)
    if order is not None:
        chosen = jnp.take_along_axis(order, chosen[:, None], -1)[:, 0]
    return chosen.astype(jnp.int32)


def _is_end(token: Int[Array, " B"], ends: Int[Array, " E"]) -> Bool[Array, " B"]:
    return (token[:, None] == ends).any(-1)


@partial(jax.jit, static_argnames=("graphdef", "capacity", "top_k"))
def _prefill(
    *,
    graphdef: nnx.GraphDef[Decoder],
    state: nnx.State,
    input_ids: Int[Array, "B P"],
    prompt_mask: Bool[Array, "B P"],
    ends: Int[Array, " E"],
    sampler: Sampler,
    capacity: int,
    top_k: int | None,
) -> Progress:
    """Read the prompts and draw the first tokens."""
    model = nnx.merge(graphdef, state)
    x, cache = model.prefill(input_ids, prompt_mask, capacity=capacity)
    token = _draw(model.logits(x), sampler, top_k, jnp.int32(0))
    return Progress(cache, token, _is_end(token, ends), jnp.int32(1))


@partial(jax.jit, static_argnames=("graphdef", "top_k", "steps"), donate_argnames="progress")
def _decode(
    *,
    graphdef: nnx.GraphDef[Decoder],
    state: nnx.State,
    progress: Progress,
    prompt_mask: Bool[Array, "B P"],
    ends: Int[Array, " E"],
    sampler: Sampler,
    top_k: int | None,
    last_step: Int[Array, ""],
    steps: int,
) -> tuple[Progress, Int[Array, "B n"]]:
    """Up to `steps` steps, fewer where all rows end; returns the tokens of each."""
    model = nnx.merge(graphdef, state)
    width, capacity = prompt_mask.shape[1], progress.cache[0].keys.shape[2]
    place = jnp.arange(capacity)
    prompt = jnp.pad(prompt_mask, ((0, 0), (0, capacity - width)))
    first = progress.step
    last = jnp.minimum(first + steps, last_step)

    def unfinished(carry: tuple[Progress, jax.Array]) -> jax.Array:
        return (carry[0].step < last) & ~carry[0].done.all()

    def step(carry: tuple[Progress, jax.Array]) -> tuple[Progress, jax.Array]:
        (cache, token, done, step), tokens = carry
        index = width + step - 1
        mask = prompt | ((place >= width) & (place <= index))
        x, cache = model.decode(token, cache, mask, index)
        token = _draw(model.logits(x), sampler, top_k, step)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], step - first, 1)
        return Progress(cache, token, done | _is_end(token, ends), step + 1), tokens

    tokens = jnp.zeros((prompt_mask.shape[0], steps), jnp.int32)
    return jax.lax.while_loop(unfinished, step, (progress, tokens))
