"""SAELens as a child of `benchmarks.speed`, in the peers' environment.

    step       `SAETrainer.step`, as `fit` calls it. `autocast`: its trainer's; `compile`: `torch.compile` of
               `training_forward_pass`, as its runner does it
    lm         `ActivationsStore.get_activations`. `autocast_lm`: its own; `dtype`: of the model's weights
    end        its runner's parts (model, store, trainer), stepped as `fit` does
    steer      `HookedTransformer.generate`, plain or with a hook that adds a vector

The model is a `HookedTransformer` with the weights of a Hugging Face folder, unprocessed: its default.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import sae_lens
import torch
from sae_lens.config import LanguageModelSAERunnerConfig, LoggingConfig, SAETrainerConfig
from sae_lens.llm_sae_training_runner import LanguageModelSAETrainingRunner
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from benchmarks.speed_process import FAINT, Task

NAMES = {
    "standard": "Standard",
    "gated": "Gated",
    "topk": "TopK",
    "batchtopk": "BatchTopK",
    "matryoshka": "MatryoshkaBatchTopK",
    "jumprelu": "JumpReLU",
}
STEPS = 10_000  # of the run that the timed steps are part of
QUIET = LoggingConfig(log_to_wandb=False)


def make(job: dict[str, Any], arrays: Mapping[str, Tensor]) -> Task:
    return {"step": step, "lm": lm, "end": end, "steer": steer}[job["clock"]](job, arrays)


def config(job: dict[str, Any]) -> Any:
    own: dict[str, Any] = {}
    if "k" in job:
        own["k"] = job["k"]
    if job["architecture"] == "matryoshka":
        own["matryoshka_widths"] = [job["d_sae"] // share for share in (8, 4, 2, 1)]
    kind = getattr(sae_lens, f"{NAMES[job['architecture']]}TrainingSAEConfig")
    return kind(d_in=job["d_in"], d_sae=job["d_sae"], **own)


def step(job: dict[str, Any], arrays: Mapping[str, Tensor]) -> Task:
    torch.manual_seed(0)
    sae = getattr(sae_lens, f"{NAMES[job['architecture']]}TrainingSAE")(config(job))
    batches = itertools.cycle(arrays["x"].split(job["batch_size"]))
    if job.get("l0"):
        _sparse(sae, next(batches), job["l0"])
    if job.get("aux"):
        with torch.no_grad():
            sae.W_enc[:, : job["d_sae"] // 2] *= FAINT
    trainer: SAETrainer[Any, Any] = SAETrainer(
        SAETrainerConfig(
            total_training_samples=STEPS * job["batch_size"],
            train_batch_size_samples=job["batch_size"],
            lr=job["lr"],
            lr_end=job["lr"],
            autocast=job.get("autocast", False),
            dead_feature_window=1 if job.get("aux") else 1000,
            logger=QUIET,
        ),
        sae,
        batches,
    )
    if job.get("compile"):
        sae.training_forward_pass = torch.compile(sae.training_forward_pass)
    return _stepping(trainer)


def _stepping(trainer: SAETrainer[Any, Any]) -> Task:
    """`fit`'s loop, a step at a time."""
    last: dict[str, Any] = {}

    def once() -> None:
        trainer.maybe_reset_sparsity()
        last["output"] = trainer.step(next(trainer.data_provider))
        trainer.n_training_steps += 1

    def figures() -> dict[str, Any]:
        return {
            "l0": float((last["output"].feature_acts != 0).float().sum(-1).mean()),
            "dead": float(trainer.dead_neurons.float().mean()),
        }

    return Task(once, figures)


@torch.no_grad()
def _sparse(sae: Any, x: Tensor, l0: int) -> None:
    """Set the encoder's bias so that each latent fires on the same share of x and L0 is about l0."""
    p = sae.process_sae_in(x) @ sae.W_enc + sae.b_enc
    highest = p.topk(max(1, l0 * len(x) // sae.cfg.d_sae), dim=0).values[-1]
    sae.b_enc.add_((sae.threshold if hasattr(sae, "threshold") else 0) - highest)


def hooked(folder: str, dtype: str = "float32") -> Any:
    """The GPT-2 of a Hugging Face folder as an unprocessed `HookedTransformer`."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions.gpt2 import convert_gpt2_weights
    from transformers import AutoTokenizer, GPT2LMHeadModel

    theirs = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
    c = theirs.config
    cfg = HookedTransformerConfig(
        n_layers=c.n_layer,
        d_model=c.n_embd,
        n_ctx=c.n_positions,
        d_head=c.n_embd // c.n_head,
        n_heads=c.n_head,
        d_vocab=c.vocab_size,
        act_fn=c.activation_function,
        eps=c.layer_norm_epsilon,
        normalization_type="LN",
        original_architecture="GPT2LMHeadModel",
        model_name="gpt2",
        device="cpu",
        dtype=getattr(torch, dtype),
    )
    model = HookedTransformer(cfg, tokenizer=AutoTokenizer.from_pretrained(folder))
    model.load_and_process_state_dict(
        convert_gpt2_weights(theirs, cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model.to(getattr(torch, dtype)).eval().requires_grad_(False)


def dataset(ids: Tensor) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": ids.tolist()})


def lm(job: dict[str, Any], arrays: Mapping[str, Tensor]) -> Task:
    ids = arrays["ids"]
    store = ActivationsStore(
        model=hooked(job["model"], job.get("dtype", "float32")),
        dataset=dataset(ids[: 4 * job["contexts"]]),
        streaming=False,
        hook_name=job["site"],
        hook_head_index=None,
        context_size=ids.shape[1],
        d_in=job["d_in"],
        n_batches_in_buffer=64,
        total_training_tokens=ids.numel(),
        store_batch_size_prompts=job["contexts"],
        train_batch_size_tokens=1024,
        prepend_bos=True,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        autocast_lm=job.get("autocast_lm", False),
    )
    batches = itertools.cycle(ids.split(job["contexts"]))
    first = store.get_activations(ids[: job["contexts"]])
    return Task(
        lambda: store.get_activations(next(batches)), lambda: {"rms": float(first.square().mean().sqrt())}
    )


def end(job: dict[str, Any], arrays: Mapping[str, Tensor]) -> Task:
    ids = arrays["ids"]
    torch.manual_seed(0)
    runner = LanguageModelSAETrainingRunner(
        LanguageModelSAERunnerConfig(
            sae=config(job),
            model_name="gpt2",
            hook_name=job["site"],
            dataset_path="",
            streaming=False,
            is_dataset_tokenized=True,
            context_size=ids.shape[1],
            training_tokens=STEPS * job["batch_size"],
            train_batch_size_tokens=job["batch_size"],
            store_batch_size_prompts=job["contexts"],
            n_batches_in_buffer=job["ring"] // ids.shape[1],  # it counts contexts
            lr=job["lr"],
            autocast=job.get("autocast", False),
            autocast_lm=job.get("autocast", False),
            compile_sae=job.get("compile", False),
            device="cpu",
            checkpoint_path=None,
            output_path=None,
            logger=QUIET,
            verbose=False,
        ),
        override_dataset=dataset(ids),
        override_model=hooked(job["model"]),
    )
    trainer: SAETrainer[Any, Any] = SAETrainer(
        sae=runner.sae, data_provider=runner.activations_store, cfg=runner.cfg.to_sae_trainer_config()
    )
    runner._compile_sae_if_needed()
    return _stepping(trainer)


def steer(job: dict[str, Any], arrays: Mapping[str, Tensor]) -> Task:
    model = hooked(job["model"], job.get("dtype", "float32"))
    delta = arrays["direction"].to(model.cfg.dtype)
    prompt = arrays["prompt"]
    hooks = [] if job.get("plain") else [(job["site"], lambda value, hook: value + delta)]

    @torch.no_grad()
    def once() -> None:
        with model.hooks(fwd_hooks=hooks):
            out = model.generate(
                prompt,
                max_new_tokens=job["new_tokens"],
                do_sample=False,
                stop_at_eos=False,
                return_type="tokens",
                verbose=False,
            )
        assert out.shape[1] == prompt.shape[1] + job["new_tokens"]

    return Task(once)
