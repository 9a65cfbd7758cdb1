"""The training loop of judges: read `JudgeTrainer.fit` and `JudgeTrainer.step` first.

Everything random is a function of (seed, step), and all else that changes is in the checkpoint, so that a run that is
killed and resumed ends with the weights of an uninterrupted one: bit for bit where kernels repeat themselves, as
a CPU's do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtedit_fast.timing import PhaseTimer
from mtedit_fast.training.checkpoint import latest, load_checkpoint, save_checkpoint
from mtedit_fast.training.config_file import dump_config
from mtedit_fast.training.judge.agreement import METRICS
from mtedit_fast.training.judge.batch import Packer
from mtedit_fast.training.judge.config import JudgeConfig
from mtedit_fast.training.judge.data import JudgeData
from mtedit_fast.training.judge.evaluation import KINDS, Progress, Scored, predict, summarize
from mtedit_fast.training.judge.methods import Metrics, Question, Totals, new_method, new_metrics, truth_of
from mtedit_fast.training.judge.parts import Parts, save_judge


class JudgeTrainer:
    """Trains one judge on scored edits by the configured method.

    Args:
        parts: a Qwen2-VL, Qwen2.5-VL or Qwen3-VL for conditional generation on its device, with its tokenizer and image
            sizes (`parts.load_parts`). The model gets a LoRA adapter, or its own weights are trained (best in fp32).
        data: training examples; with method sft, tract or regression and thinking, they need thoughts and all scores.
        held_out: examples for `evaluate`.
    """

    def __init__(self, parts: Parts, data: JudgeData, config: JudgeConfig, held_out: JudgeData | None = None) -> None:
        self.data, self.config, self.held_out = data, config, held_out
        self.output_dir = Path(config.run.output_dir)
        self.adapter: Any = None
        self.model = self._prepare(parts.model)
        self.packer = Packer(self.model, parts.tokenizer, parts.images, config.prompt.prompt, data.image)
        self.names, self.parameters = zip(
            *((name, p) for name, p in self.model.named_parameters() if p.requires_grad), strict=True
        )
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.optimizer.lr,
            betas=(config.optimizer.betas[0], config.optimizer.betas[1]),
            weight_decay=config.optimizer.weight_decay,
        )
        self.method = new_method(config, self.packer)
        self.timer = PhaseTimer(self.model.device)
        self.iteration = 0
        self.skipped_in_a_row = 0

    def _prepare(self, model: Any) -> Any:
        config = self.config.model
        if config.lora is not None:
            from peft import LoraConfig, get_peft_model

            lora = LoraConfig(
                r=config.lora.rank,
                lora_alpha=config.lora.alpha,
                target_modules=config.lora.target_modules,
                task_type="CAUSAL_LM",
            )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.config.run.seed)
                self.adapter = get_peft_model(model, lora)
            model = self.adapter.get_base_model()
        else:
            model.requires_grad_(True)
            if not config.train_vision:
                model.model.visual.requires_grad_(False)
        if config.activation_checkpointing:
            # The first is what transformers 5.23 renamed the second to.
            names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
            next(getattr(model, name) for name in names if hasattr(model, name))({"use_reentrant": False})
        return model

    # ---- the loop

    def fit(self) -> Iterator[dict[str, float]]:
        """Train to `run.steps`, from the last checkpoint if there is one; yields each step's metrics."""
        run, every = self.config.run, self.config.evaluation.every
        if self.iteration == 0:
            self.resume()
        with self._start_log().open("a") as lines:
            while self.iteration < run.steps:
                metrics = self.step()
                self.iteration += 1
                if every and self.iteration % every == 0 and self.held_out is not None:
                    metrics |= _flat(summarize(self.evaluate()))
                lines.write(json.dumps(metrics) + "\n")
                lines.flush()
                if self.iteration % run.checkpoint_every == 0 or self.iteration == run.steps:
                    self.save()
                yield metrics

    def step(self) -> dict[str, float]:
        """One optimizer step: draw examples, have the method make its questions, accumulate gradients, update."""
        settings = self.config.optimizer
        metrics = new_metrics()
        examples = self.data.draw(self.iteration, settings.questions)
        with self.timer("sample"), self._autocast():
            questions = self.method.questions(examples, self.iteration, metrics)
        totals = Totals(*map(sum, zip(*(question.totals() for question in questions), strict=True)))
        with self.timer("learn"):
            loss = self._accumulate(questions, totals, metrics)
        rate = self._set_learning_rate()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, settings.max_grad_norm)
        taken = bool(loss.isfinite() & norm.isfinite())
        if taken:
            with self.timer("update"):
                self.optimizer.step()
        self.optimizer.zero_grad()
        self._count_skipped(taken)
        means = {name: sum(values) / len(values) for name, values in metrics.items() if values}
        seconds = {f"seconds/{name}": value for name, value in self.timer.seconds().items()}
        return {
            "step": self.iteration,
            "loss": loss.item(),
            "grad_norm": norm.item(),
            "skipped": float(not taken),
            "learning_rate": rate,
            **means,
            **seconds,
        }

    def _accumulate(self, questions: list[Question], totals: Totals, metrics: Metrics) -> Tensor:
        """Gradients of the step's loss, micro-batch by micro-batch; rows of similar length go together."""
        learned = [q for q in questions if any(q.advantage) or not q.advantage]
        learned.sort(key=lambda question: self.packer.length(question.row))
        total = torch.zeros((), device=self.model.device)
        size = self.config.optimizer.micro_batch
        self.model.train()
        for start in range(0, len(learned), size):
            part = learned[start : start + size]
            batch = self.packer.pack([question.row for question in part])
            truth = truth_of(part, batch)
            with self._autocast():
                prediction = self.packer.predict(batch, truth)
            loss = self.method.loss(part, batch, prediction, truth, totals, metrics)
            if loss.requires_grad:
                loss.backward()
            total += loss.detach()
        self.model.eval()
        return total

    def evaluate(self, progress: Progress | None = None) -> list[Scored]:
        """What the present weights say about the held-out examples."""
        if self.held_out is None:
            raise ValueError("evaluation.path: expected held-out examples, got null")
        settings, sampling = self.config.evaluation, self.config.sampling
        with self._autocast(), self.packer.loading(self.held_out.image):
            return predict(
                self.packer,
                self.held_out.examples[: settings.examples],
                samples=settings.samples,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_new_tokens=sampling.max_new_tokens,
                batch=settings.batch,
                seed=settings.seed,
                progress=progress,
            )

    def _autocast(self) -> AbstractContextManager:
        """Full weights are kept in fp32, where small updates count, and computed with in `model.dtype`."""
        if self.config.model.dtype == "bf16" and self.adapter is None:
            return torch.autocast(self.model.device.type, torch.bfloat16)
        return nullcontext()

    def _set_learning_rate(self) -> float:
        """A function of the step alone, so that there is no scheduler state to resume."""
        settings, steps = self.config.optimizer, self.config.run.steps
        factor = 1 - self.iteration / steps if settings.lr_schedule == "linear" else 1.0
        factor *= min(1.0, (self.iteration + 1) / (settings.warmup + 1))
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * factor
        return settings.lr * factor

    def _count_skipped(self, taken: bool) -> None:
        self.skipped_in_a_row = 0 if taken else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= self.config.optimizer.max_skipped:
            raise FloatingPointError(
                f"loss or gradient: not finite in {self.skipped_in_a_row} steps in a row (optimizer.max_skipped); none "
                "of them was taken, the weights and the last checkpoint are good: lower optimizer.lr, then start again "
                "to go on"
            )

    # ---- state

    @property
    def fingerprint(self) -> str:
        """What a checkpoint must agree on to be loaded."""
        shapes = {name: list(p.shape) for name, p in zip(self.names, self.parameters, strict=True)}
        digest = hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()[:12]
        lora = self.config.model.lora
        kind = "all weights" if lora is None else f"LoRA rank {lora.rank} alpha {lora.alpha}"
        return f"{self.model.config.model_type}, {self.config.method.name}, {kind}, shapes {digest}"

    def tensors(self) -> dict[str, Tensor]:
        """The trained tensors by name."""
        return dict(zip(self.names, (p.detach() for p in self.parameters), strict=True))

    def save(self) -> Path:
        """Write a checkpoint atomically; on a full disk the last good one stays."""
        return save_checkpoint(
            self.output_dir / "checkpoints",
            self.iteration,
            self.tensors(),
            {
                "iteration": self.iteration,
                "optimizer": self.optimizer.state_dict(),
                "skipped_in_a_row": self.skipped_in_a_row,
            },
            self.fingerprint,
            keep=self.config.run.keep_checkpoints,
        )

    def resume(self) -> bool:
        """Load the newest complete checkpoint of `output_dir`; False when there is none."""
        path = latest(self.output_dir / "checkpoints")
        if path is None:
            return False
        saved, state = load_checkpoint(path, self.fingerprint)
        for name, tensor in self.tensors().items():
            tensor.copy_(saved[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.iteration, self.skipped_in_a_row = state["iteration"], state["skipped_in_a_row"]
        return True

    def export(self) -> Path:
        """Write the whole judge to output_dir/model, for `HuggingFaceJudge.from_pretrained` and servers; with LoRA also
        the adapter to output_dir/lora. The adapter is merged into the model, so training ends here."""
        if self.adapter is not None:
            self.adapter.save_pretrained(str(self.output_dir / "lora"))
            self.model = self.packer.model = self.adapter.merge_and_unload()
        parts = Parts(self.model, self.packer.tokenizer, self.packer.images)
        return save_judge(self.output_dir / "model", parts, self.packer.prompt, self.config.model.path)

    def _start_log(self) -> Path:
        """config.yaml and metrics.jsonl; lines after the resumed checkpoint are dropped and made again."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        (self.output_dir / "config.yaml").write_text(dump_config(self.config), encoding="utf-8")
        path = self.output_dir / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step(line) < self.iteration]
            path.write_text("".join(f"{line}\n" for line in kept))
        return path


def _flat(summary: dict[str, Any]) -> dict[str, float]:
    """`eval/{kind}/{metric}` of what is known."""
    kinds = [kind for kind in KINDS if kind in summary]
    means = {f"eval/{kind}/{metric}": summary[kind][metric]["mean"] for kind in kinds for metric in METRICS}
    return {name: value for name, value in means.items() if value is not None}


def _step(line: str) -> float:
    """The step of a metrics line; infinity for one that a killed run left half written."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")
