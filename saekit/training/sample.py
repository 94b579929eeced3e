"""Sample documents from a language model into token shards, hundreds of rows at once.

    python -m saekit.training.sample tiny --tokens 2_500_000 --out DIR

A document starts from BOS and ends where the model says so, or with its context. The shards are text of the
model's own making: a corpus that can be shipped where the texts it was trained on cannot.

N rows sampled together, V entries of the tokenizer.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from saekit.errors import InvalidInput, SaekitError, first_line
from saekit.files import finite_number
from saekit.lm import fast_dtype, locate, quiet_loading, tokenizer_hash
from saekit.text import SHARD_SUFFIX, Ids, write_shard

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHORTEST = 16  # tokens: below it a document is hardly one
SHARD_BYTES = 1_900_000
ROWS = 256  # sampled together


def sample_documents(
    model: str | Path,
    tokens: int,
    seed: int,
    out: Path,
    temperature: float = 1.0,
    *,
    rows: int = ROWS,
    device: str | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Sample at least `tokens` tokens of whole documents into `out/sample-<n>.tokens.safetensors`; returns the shards.

    model: `"tiny"`, a Hugging Face folder or a hub id. Documents of fewer than 16 tokens are left out.
    The same arguments on the same machine give the same shards.

    Raises `InvalidInput` for a wrong argument, a folder that holds shards already, or a model whose documents
    are all too short; `FileMissing` for a model that is not there.
    """
    if finite_number(temperature, "temperature") <= 0:
        raise InvalidInput(f"temperature: {temperature}; expected more than 0")
    if tokens < 1 or rows < 1:
        raise InvalidInput(f"tokens and rows: expected 1 or more, got {tokens} and {rows}")
    if any(out.glob(f"*{SHARD_SUFFIX}")):
        raise InvalidInput(f"{out} holds token shards already; name another folder or remove them")
    lm, tokenizer = _load(model, device)
    specials = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}
    separator = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if separator is None:
        raise InvalidInput(f"model {str(model)!r}: no BOS or EOS to start a document with")
    generator = torch.Generator().manual_seed(seed)
    kept: list[Ids] = []
    count, start = 0, time.perf_counter()
    while count < tokens:
        batch = _sample(lm, rows, separator, sorted(specials), temperature, generator)
        long_enough = [ids for ids in batch if len(ids) >= SHORTEST]
        if not long_enough:
            raise InvalidInput(f"model {str(model)!r}: none of {rows} documents has {SHORTEST} tokens")
        for ids in long_enough:
            if count < tokens:
                kept.append(ids)
                count += len(ids)
        rate = count / (time.perf_counter() - start)
        report(f"{count:,} of {tokens:,} tokens in {len(kept):,} documents  {rate:,.0f} tokens/s")
    note = f"sampled from {Path(model).name}, seed {seed}, temperature {temperature:g}"
    out.mkdir(parents=True, exist_ok=True)
    shards = []
    for number, docs in enumerate(_by_size(kept, SHARD_BYTES // (2 if len(tokenizer) < 2**16 else 4))):
        shards.append(out / f"sample-{number}{SHARD_SUFFIX}")
        write_shard(shards[-1], docs, separator=separator, tokenizer=tokenizer_hash(tokenizer), note=note)
    return shards


def _load(model: str | Path, device: str | None) -> tuple[PreTrainedModel, Any]:
    """The plain Hugging Face model, without the bridge's hooks, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = locate(model)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with quiet_loading():
            # eager: for one query a row, the fused CPU kernel takes three times as long
            lm: Any = AutoModelForCausalLM.from_pretrained(
                place, dtype=fast_dtype(device), attn_implementation="eager" if device == "cpu" else "sdpa"
            )
        tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InvalidInput(f"model {str(model)!r} could not be loaded ({first_line(error)})") from error
    return lm.to(device).eval(), tokenizer


@torch.inference_mode()
def _sample(
    lm: PreTrainedModel,
    n: int,
    separator: int,
    specials: list[int],
    temperature: float,
    generator: torch.Generator,
) -> list[Ids]:
    """`n` documents, each the ids between BOS and the first special id or the end of the context."""
    from transformers import DynamicCache

    end = specials[0]
    drawn = torch.full((n, lm.config.max_position_embeddings - 1), end)
    rows = torch.arange(n)  # which documents the cache holds
    ids = torch.full((n, 1), separator)
    ended = torch.zeros(n, dtype=torch.bool)
    cache = DynamicCache(config=lm.config)
    for position in range(drawn.shape[1]):
        logits = lm(ids.to(lm.device), past_key_values=cache, use_cache=True).logits[:, -1]
        ids = _draw(logits, temperature, generator)
        drawn[rows, position] = ids[:, 0]
        ended |= torch.isin(ids[:, 0], torch.tensor(specials))
        if ended.all():
            break
        if ended.sum() > len(ended) // 2:  # ended rows are carried along until dropping them pays
            left = torch.nonzero(~ended)[:, 0]
            cache.batch_select_indices(left.to(lm.device))
            rows, ids, ended = rows[left], ids[left], ended[left]
    documents = drawn.numpy().astype(np.int32)
    lengths = np.isin(np.pad(documents, ((0, 0), (0, 1)), constant_values=end), specials).argmax(axis=1)
    return [ids[:length] for ids, length in zip(documents, lengths, strict=True)]


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """One id per row, int64 [N, 1], from logits [N, V]: where a uniform number falls in the summed probabilities."""
    sums = (logits.float() / temperature).softmax(-1).cumsum(-1)
    uniform = torch.rand(len(sums), 1, generator=generator).to(sums.device)
    ids = torch.searchsorted(sums, uniform * sums[:, -1:])  # the sum is 1 up to rounding
    return ids.clamp_(max=logits.shape[-1] - 1).cpu()


def _by_size(documents: list[Ids], most: int) -> list[list[Ids]]:
    """Documents in groups of up to `most` ids, separators included."""
    groups: list[list[Ids]] = []
    room = 0
    for ids in documents:
        if not groups or len(ids) + 1 > room:
            groups.append([])
            room = most
        groups[-1].append(ids)
        room -= len(ids) + 1
    return groups


def main(arguments: list[str] | None = None) -> int:
    """The command line above; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m saekit.training.sample", description=__doc__.split("\n")[0]
    )
    parser.add_argument("model", help='"tiny", a Hugging Face folder or a hub id')
    parser.add_argument("--tokens", type=int, required=True, help="how many, at least; 2_500_000 is fine")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=1.0)
    options = parser.parse_args(arguments)
    try:
        shards = sample_documents(
            options.model, options.tokens, options.seed, options.out, options.temperature, report=print
        )
    except SaekitError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(str(path) for path in shards))
    return 0


if __name__ == "__main__":
    sys.exit(main())
