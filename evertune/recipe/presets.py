"""Values that neither a stage nor `defaults` gives, and where each number comes from.

| preset   | tune      | lr    | epochs | replay | anchor kl |
|----------|-----------|-------|--------|--------|-----------|
| gentle   | LoRA 16   | 1e-4  | 1      | 0.3    | 0.1       |
| balanced | LoRA 16   | 2e-4  | 2      | 0.2    | 0.05      |
| full     | full      | 2e-5  | 2      | 0.2    | 0.05      |

LoRA rank 16: Apple's shipped adapters (arXiv:2407.21075); alpha twice the rank. LoRA learning rate about ten times that
of full fine-tuning, 1e-4 to 2e-4 (arXiv:2405.09673). Full: 1e-5 to 5e-5 below 2B parameters; two epochs as in Tulu 3
(arXiv:2411.15124), where longer did not help. Replay share 0.2 of the stream, to be swept over 0.05 to 0.3; 0.3 is its
upper end. Anchor 0.05 to 0.1: the range reported for supervised KL anchors (arXiv:2509.23753), a research method:
validate it on your own probes.
"""

from dataclasses import dataclass

from evertune.recipe.schema import Anchor, Ema, Lora, Recipe, Replay, Sft, Tune


@dataclass(frozen=True)
class Preset:
    """One row of the table; `lora_lr` and `full_lr` apply by what is trained."""

    tune: Tune
    lora_lr: float
    full_lr: float
    epochs: float
    replay_share: float
    anchor_kl: float


LORA_16 = Tune(lora=Lora(rank=16))
FULL = Tune(full={})

PRESETS = {
    "gentle": Preset(LORA_16, lora_lr=1e-4, full_lr=1e-5, epochs=1.0, replay_share=0.3, anchor_kl=0.1),
    "balanced": Preset(LORA_16, lora_lr=2e-4, full_lr=2e-5, epochs=2.0, replay_share=0.2, anchor_kl=0.05),
    "full": Preset(FULL, lora_lr=2e-4, full_lr=2e-5, epochs=2.0, replay_share=0.2, anchor_kl=0.05),
}


@dataclass(frozen=True)
class ResolvedSft:
    """An sft stage with every value given: the stage's, else the defaults', else the preset's."""

    tune: Tune
    replay: Replay
    anchor: Anchor
    lr: float
    epochs: float | None
    steps: int | None
    schedule: str
    warmup: float
    batch_rows: int
    micro_batch_rows: int
    max_tokens: int
    too_long: str
    weight_decay: float
    clip: float | None
    gradient_checkpointing: bool
    ema: Ema | None
    save_steps: int


def resolve_stage(recipe: Recipe, stage: Sft) -> ResolvedSft:
    """Fill in what a stage leaves open. Replay share 0 and anchor kl 0 mean "off"."""
    preset = PRESETS[recipe.preset]
    tune = stage.tune or recipe.defaults.tune or preset.tune
    epochs = stage.epochs if stage.epochs is not None or stage.steps is not None else preset.epochs
    return ResolvedSft(
        tune=tune,
        replay=stage.replay or recipe.defaults.replay or Replay(share=preset.replay_share),
        anchor=stage.anchor or recipe.defaults.anchor or Anchor(kl=preset.anchor_kl),
        lr=stage.lr if stage.lr is not None else (preset.lora_lr if tune.lora else preset.full_lr),
        epochs=epochs,
        steps=stage.steps,
        schedule=stage.schedule,
        warmup=stage.warmup,
        batch_rows=stage.batch_rows,
        micro_batch_rows=stage.micro_batch_rows,
        max_tokens=stage.max_tokens,
        too_long=stage.too_long,
        weight_decay=stage.weight_decay,
        clip=stage.clip,
        gradient_checkpointing=stage.gradient_checkpointing,
        ema=stage.ema,
        save_steps=stage.save_steps,
    )
