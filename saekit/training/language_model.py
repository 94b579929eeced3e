"""Train a GPT-2-style language model, tokenizer included, from a recipe: small models, one device.

    texts ─▶ byte-level BPE ─▶ ids of documents ─shuffled, packed─▶ [B, T+1] ─step─▶ checkpoint ─▶ final/

    <run>/recipe.yaml    the recipe with every default spelled out
          tokenizer/     Hugging Face layout
          metrics.jsonl  every logged row
          step-<n>/      exact state, the newest few
          final/         the model, Hugging Face layout, bf16, with a card that tells its numbers

On a CPU the same recipe and number of threads give the same bits, interrupted and resumed or not; on a GPU,
attention's backward adds up in no fixed order. The corpus is held in memory as ids.

B contexts in a step, T context_size, D width, V entries of the tokenizer.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed

from saekit.errors import Interrupted, InvalidInput, near
from saekit.files import staged, write_tensors
from saekit.lm import DTYPES, fast_dtype
from saekit.locks import exclusive
from saekit.recipe import LanguageModelRecipe, differences, read_recipe, write_recipe
from saekit.text import Ids, documents
from saekit.tokens import Position, Tokens
from saekit.training import checkpoint
from saekit.training.schedules import learning_rate
from saekit.training.tracking import SAMPLES, Tracker

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

Item = TypeVar("Item")
Report = Callable[[str], None]
Texts = dict[str, list[str]]  # the documents of each file, by the file's name without suffix

SEPARATOR, SEPARATOR_ID = "<|endoftext|>", 0  # BOS, EOS, and what stands between documents
LOGITS_AT_ONCE = 256  # positions whose fp32 logits [·, V] are held; a few MB, which a CPU's cache takes
# What may change between a run and its resumption: how long it is, what it logs, what it keeps.
FREE_ON_RESUME = (
    "training.tokens",
    "training.log_every",
    "training.evaluate_every",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "wandb",
)


def train_language_model(recipe: LanguageModelRecipe, run: Path, *, resume: bool, report: Report) -> Path:
    """Train the model that a recipe describes, into the folder `run`; returns `run / "final"`.

    resume: go on from the newest checkpoint (start, where there is none; change nothing, where the run is finished).
    report: gets one plain line of text at a time.

    Raises `InvalidInput` for a run that exists and is not to be resumed, a resumption with another recipe, a
    `repeat` of no file, or a loss that is not finite; `FileMissing` for texts that are not there; `Interrupted`
    after SIGINT or SIGTERM, once a checkpoint is written.
    """
    if not resume:
        checkpoint.check_new(run)
    recipe = _resolved(recipe, run / "recipe.yaml")
    final, newest = run / "final", checkpoint.newest(run)
    if final.exists() and newest is not None and newest.name == f"step-{recipe.steps}":
        checkpoint.settle(run, recipe.training.keep_checkpoints)
        report(f"{run} is finished; nothing to do")
        return final
    with exclusive(run, report), checkpoint.disk_errors_told(run):
        if not resume:
            checkpoint.check_new(run)  # nobody may have written it meanwhile
        checkpoint.clean(run)
        newest = checkpoint.newest(run, report)
        session = _Session(recipe, run, report)
        if newest is not None:
            session.restore(newest)
        return session.run()


def _resolved(recipe: LanguageModelRecipe, before: Path) -> LanguageModelRecipe:
    """The recipe with device and dtype chosen: as in the run so far, or by what this machine is fast at."""
    earlier = read_recipe(before) if before.exists() else None
    if isinstance(earlier, LanguageModelRecipe):
        device, dtype = recipe.device or earlier.device, recipe.dtype or earlier.dtype
    else:
        device = recipe.device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = recipe.dtype or ("bfloat16" if fast_dtype(device) == torch.bfloat16 else "float32")
    recipe = recipe.model_copy(update={"device": device, "dtype": dtype})
    changed = [] if earlier is None else [key for key, *_ in differences(earlier, recipe, FREE_ON_RESUME)]
    if changed:
        raise InvalidInput(
            f"run {before.parent} was started with another recipe: {', '.join(changed)} "
            "changed; give the new one another name"
        )
    return recipe


class _Session:
    """One process's part of a run, from its start or its newest checkpoint to the end or a signal."""

    def __init__(self, recipe: LanguageModelRecipe, run: Path, report: Report) -> None:
        self.recipe, self.path, self.report = recipe, run, report
        self.device, self.dtype = torch.device(recipe.device or "cpu"), DTYPES[recipe.dtype or "float32"]
        self.step, self.position, self.wandb_id = 0, Position(), None
        texts = read_texts(recipe)
        held_out = read_held_out(recipe)
        run.mkdir(parents=True, exist_ok=True)
        write_recipe(run / "recipe.yaml", recipe)
        self.tokenizer = _tokenizer(recipe, texts, run / "tokenizer", report)
        corpus = _corpus(recipe, self.tokenizer, texts)
        self.corpus_tokens = sum(1 + len(ids) for ids in corpus)
        self.contexts = _contexts(recipe, self.tokenizer, corpus, epochs=None)
        self.held_out = {
            source: torch.stack([*_contexts(recipe, self.tokenizer, encode(self.tokenizer, some), epochs=1)])
            for source, some in held_out.items()
        }
        self.model = new_model(recipe, len(self.tokenizer), self.device)
        self.parameters = dict(self.model.named_parameters())  # the tied embedding once
        self.optimizer = _optimizer(recipe, self.parameters)
        report(
            f"{sum(p.numel() for p in self.parameters.values()):,} parameters on {self.device} ({recipe.dtype}); "
            f"{len(corpus):,} documents, {self.corpus_tokens:,} tokens an epoch, {recipe.steps:,} steps"
        )

    def run(self) -> Path:
        recipe = self.recipe
        self.tracker = Tracker(
            self.path,
            recipe.name,
            recipe.model_dump(mode="json"),
            recipe.wandb,
            wandb_id=self.wandb_id,
            step=self.step,
        )
        failed = True
        try:
            self._steps()
            final = self._finish()
            failed = False
            return final
        finally:
            self.tracker.close(failed=failed)

    def _steps(self) -> None:
        config, steps = self.recipe.training, self.recipe.steps
        batches = self.contexts.batches(config.batch_size, self.position)
        clock = _Clock(self.step)
        with checkpoint.stop_on_signals() as stop:
            while self.step < steps:
                batch = next(batches)
                loss = self._step(batch.ids.to(self.device))
                self.step, self.position = self.step + 1, batch.position
                if self.step % config.log_every == 0 or self.step == steps:
                    self._log(loss, clock)
                if self.step == steps:
                    return
                if config.evaluate_every and self.step % config.evaluate_every == 0:
                    self._evaluate()
                if stop.asked or (config.checkpoint_every and self.step % config.checkpoint_every == 0):
                    self._checkpoint()
                if stop.asked:
                    raise Interrupted(f"stopped at step {self.step} of {steps}; go on with --resume")

    def _step(self, ids: Tensor) -> Tensor:
        """One optimizer step on contexts [B, T+1]; the mean loss in nats per token, before the step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        with self._fast():
            loss = token_losses(self.model, ids).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.training.clip_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def _learning_rate(self) -> float:
        """Linear from `lr_end` up, flat, linear down to `lr_end`."""
        config = self.recipe.training
        factor = learning_rate(
            self.step, self.recipe.steps, shape="linear", warmup=config.lr_warmup, decay=config.lr_decay
        )
        return config.lr * (config.lr_end + (1 - config.lr_end) * factor)

    def _fast(self) -> contextlib.AbstractContextManager[Any]:
        """Matrix products in the recipe's dtype, the rest in fp32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _log(self, loss: Tensor, clock: _Clock) -> None:
        value = loss.item()
        if not math.isfinite(value):
            raise InvalidInput(
                f"the loss became {value} at step {self.step}: lower training.lr (now {self.recipe.training.lr})"
            )
        per_second = clock.rate(self.step) * self.recipe.tokens_per_step
        left = (self.recipe.steps - self.step) * self.recipe.tokens_per_step / per_second
        self.tracker.log(
            self._row(
                {
                    "losses/overall_loss": value,
                    "details/current_learning_rate": self.optimizer.param_groups[0]["lr"],
                    "details/tokens_per_second": round(per_second),
                }
            )
        )
        self.report(
            f"step {self.step:,} of {self.recipe.steps:,}  loss {value:.3f}  {per_second:,.0f} tokens/s  "
            f"{left // 3600:.0f}:{left % 3600 // 60:02.0f} h left"
        )

    def _row(self, figures: Mapping[str, float]) -> dict[str, float]:
        return {"step": self.step, SAMPLES: self.step * self.recipe.tokens_per_step, **figures}

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """Held-out loss of each source, nats per token; separators are read but not counted as predictions."""
        losses = {}
        for source, contexts in self.held_out.items():
            total, count = 0.0, 0
            for ids in contexts.split(self.recipe.training.batch_size):
                ids = ids.to(self.device)
                with self._fast():
                    some = token_losses(self.model, ids)[ids[:, 1:] != SEPARATOR_ID]
                total, count = total + some.sum(dtype=torch.float64).item(), count + len(some)
            losses[source] = total / count
        self.tracker.log(self._row({f"held_out/{source}": loss for source, loss in losses.items()}))
        self.report("held out  " + "  ".join(f"{source} {loss:.3f}" for source, loss in losses.items()))
        return losses

    def _checkpoint(self) -> None:
        self.tracker.checkpointed()
        tensors = {f"model.{name}": parameter for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        state = {"step": self.step, "position": self.position, "wandb_id": self.tracker.wandb_id}
        checkpoint.save(self.path, self.step, tensors, state, self.recipe.training.keep_checkpoints)

    @torch.no_grad()
    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint of this run."""
        tensors, state = checkpoint.load(folder)
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"model.{name}"])
            self.optimizer.state[parameter] = {
                key: tensors[f"optimizer.{key}.{name}"].to(parameter.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
        self.step, self.wandb_id = state["step"], state["wandb_id"]
        self.position = Position(*state["position"])
        self.report(f"resumed from {folder}")

    def _finish(self) -> Path:
        """Evaluate, write `final`, and only then the last checkpoint, which is what makes a run finished."""
        losses = self._evaluate()
        final = self.path / "final"
        with staged(final) as building:
            write_model(building, self.model)
            self.tokenizer.save_pretrained(building)
            (building / "README.md").write_text(self._card(losses), "utf-8")
        self._checkpoint()
        self.tracker.publish(final, self.recipe.name, losses)
        self.report(f"wrote {final}")
        return final

    def _card(self, losses: Mapping[str, float]) -> str:
        """The model card: what was trained, on what, how, and how well it predicts."""
        recipe, model, config = self.recipe, self.recipe.language_model, self.recipe.training
        files = [Path(path).name.partition(".")[0] for path in recipe.data.text]
        tokens = self.step * recipe.tokens_per_step
        parameters = sum(parameter.numel() for parameter in self.parameters.values())
        best_first = sorted(losses.items(), key=lambda item: item[1])
        return f"""# {recipe.name}

A small GPT-2-style language model, trained from scratch by saekit; `recipe.yaml` of its run makes it again.

- Architecture: GPT-2 (learned positions, pre-LayerNorm, gelu_new, tied embeddings): width {model.width}, \
{model.blocks} blocks, {model.heads} heads, context {recipe.data.context_size}, {parameters:,} parameters; \
stored bf16, Hugging Face layout.
- Tokenizer: byte-level BPE, {len(self.tokenizer):,} entries, trained on the same texts\
{_times(model.tokenizer.repeat)}; `{SEPARATOR}` = {SEPARATOR_ID} is BOS, EOS and document separator, and is put \
before a text.
- Data: {", ".join(files)}{_times(recipe.data.repeat)}; documents shuffled in each epoch, each preceded by BOS, \
packed; {self.corpus_tokens:,} tokens an epoch.
- Training: {self.step:,} steps of {config.batch_size} × {recipe.data.context_size} tokens ({tokens:,} tokens, \
{tokens / self.corpus_tokens:.1f} epochs), AdamW {config.adam_betas}, weight decay {config.weight_decay:g} on \
matrices, learning rate {config.lr:g} with {config.lr_warmup:.1%} warm-up and a linear decay to \
{config.lr_end:.1%} over the last {config.lr_decay:.0%}, clip {config.clip_grad_norm:g}, {recipe.dtype} matrix \
products on {recipe.device}, seed {recipe.seed}.
- Held-out loss, nats per token, BOS not counted: {", ".join(f"{source} {loss:.2f}" for source, loss in best_first)}.
- Limits: it has seen only the texts named above and shares their biases; for research and teaching.
"""


def _times(repeat: Mapping[str, int]) -> str:
    return f" ({', '.join(f'{name} × {times}' for name, times in repeat.items())})" if repeat else ""


class _Clock:
    """Steps per second since the last question, so that evaluations and pauses do not count for long."""

    def __init__(self, step: int) -> None:
        self._step, self._time = step, time.perf_counter()

    def rate(self, step: int) -> float:
        now = time.perf_counter()
        rate = (step - self._step) / max(1e-9, now - self._time)
        self._step, self._time = step, now
        return rate


# The model


def new_model(recipe: LanguageModelRecipe, vocabulary: int, device: torch.device) -> GPT2LMHeadModel:
    """GPT-2 with random weights, which depend on the recipe's seed alone: they are drawn on the CPU."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=recipe.data.context_size,
        n_embd=recipe.language_model.width,
        n_layer=recipe.language_model.blocks,
        n_head=recipe.language_model.heads,
        activation_function="gelu_pytorch_tanh",  # gelu_new in one kernel instead of eight
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=SEPARATOR_ID,
        eos_token_id=SEPARATOR_ID,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)
        model: Any = GPT2LMHeadModel(config)
    return model.to(device)


def _optimizer(recipe: LanguageModelRecipe, parameters: Mapping[str, Tensor]) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves biases and LayerNorm gains alone."""
    config = recipe.training
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.adam_betas, fused=True)


def token_losses(model: GPT2LMHeadModel, ids: Tensor) -> Tensor:
    """Nats it costs to predict each id from those before it: ids [B, T+1] → [B, T] fp32."""
    hidden = model.transformer(ids[:, :-1], use_cache=False).last_hidden_state  # [B, T, D]
    logits = model.lm_head(hidden.flatten(0, 1))  # [B·T, V]
    # All logits in fp32 would be 256 MB; a few rows at a time, made again in the backward, take half the time.
    losses = [
        recomputed(_cross_entropy, some, targets, use_reentrant=False, preserve_rng_state=False)
        for some, targets in zip(
            logits.split(LOGITS_AT_ONCE), ids[:, 1:].flatten().split(LOGITS_AT_ONCE), strict=True
        )
    ]
    return torch.cat(losses).view(len(ids), -1)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="none")


def write_model(folder: Path, model: GPT2LMHeadModel) -> None:
    """Weights in bf16, config and generation config, as `from_pretrained` expects them."""
    config = copy.deepcopy(model.config)
    config.architectures = ["GPT2LMHeadModel"]
    config.dtype = torch.bfloat16
    config.activation_function = "gelu_new"  # the name that every reader of GPT-2 knows; the same function
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    weights = {name: parameter.detach().bfloat16() for name, parameter in model.named_parameters()}
    write_tensors(folder / "model.safetensors", weights, {"format": "pt"})


# Texts and tokens


def read_texts(recipe: LanguageModelRecipe) -> Texts:
    """The documents of each of the recipe's files."""
    data = recipe.data
    texts = {Path(path).name.partition(".")[0]: _texts(path, data.field) for path in data.text}
    named = [*data.repeat, *recipe.language_model.tokenizer.repeat]
    if unknown := [name for name in named if name not in texts]:
        hint = near(unknown[0], texts)
        raise InvalidInput(
            f"repeat: {unknown[0]!r} is no file of data.text ({', '.join(texts)}). {hint}".rstrip()
        )
    return texts


def read_held_out(recipe: LanguageModelRecipe) -> Texts:
    """The held-out documents of each source."""
    data = recipe.data
    texts: Texts = {}
    sources = _texts(data.held_out_text, data.held_out_source)
    for source, text in zip(sources, _texts(data.held_out_text, data.field), strict=True):
        texts.setdefault(source, []).append(text)
    return dict(sorted(texts.items()))


def _texts(path: str, field: str) -> list[str]:
    texts = [document for document in documents(Path(path), field=field)() if isinstance(document, str)]
    if not texts:
        raise InvalidInput(f"data: {path} holds no text")
    return texts


def repeated(files: Mapping[str, list[Item]], repeat: Mapping[str, int]) -> list[Item]:
    """The items of all files, those of a file named in `repeat` so many times."""
    return [item for name, items in files.items() for item in items * repeat.get(name, 1)]


def _tokenizer(
    recipe: LanguageModelRecipe, texts: Texts, folder: Path, report: Report
) -> PreTrainedTokenizerFast:
    """The run's tokenizer: the one already there, else trained now."""
    from transformers import PreTrainedTokenizerFast

    if folder.exists():
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
        return tokenizer
    report("training the tokenizer")
    section = recipe.language_model.tokenizer
    tokenizer = train_tokenizer(repeated(texts, section.repeat), section.vocab_size, recipe.data.context_size)
    with staged(folder) as building:
        tokenizer.save_pretrained(building)
    return tokenizer


def train_tokenizer(texts: list[str], vocabulary: int, context_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of up to `vocabulary` entries that puts `<|endoftext|>` before a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[SEPARATOR],  # the first entry: id 0
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SEPARATOR} $A",
        pair=f"{SEPARATOR} $A {SEPARATOR} $B:1",
        special_tokens=[(SEPARATOR, SEPARATOR_ID)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SEPARATOR, eos_token=SEPARATOR, model_max_length=context_size
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[Ids]:
    """Each text's ids, int32, without the separator."""
    # straight to the Rust tokenizer: the wrapper would warn of texts longer than the model's context
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encoded]


def _corpus(recipe: LanguageModelRecipe, tokenizer: PreTrainedTokenizerFast, texts: Texts) -> list[Ids]:
    """The documents of an epoch, in one random order: `Tokens` draws another from it for each epoch.

    It draws among the next 16,384 only; mixed beforehand, these are a sample of all files.
    """
    documents = repeated({name: encode(tokenizer, some) for name, some in texts.items()}, recipe.data.repeat)
    return [documents[i] for i in np.random.default_rng(recipe.seed).permutation(len(documents))]


def _contexts(
    recipe: LanguageModelRecipe,
    tokenizer: PreTrainedTokenizerFast,
    documents: list[Ids],
    *,
    epochs: int | None,
) -> Tokens:
    """Rows of T + 1 ids: T inputs and, one place on, T targets, so that the last position is trained too."""
    return Tokens(
        source=lambda: iter(documents),
        tokenizer=tokenizer,
        context_size=recipe.data.context_size + 1,
        separator=SEPARATOR_ID,
        special=(SEPARATOR_ID,),
        label=f"texts of {recipe.name}",
        shuffle=recipe.seed if epochs is None else None,
        epochs=epochs,
    )
