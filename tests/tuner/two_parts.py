"""A small space of two parts: probes, and fine-tuning from the best of them."""

from __future__ import annotations

TWO_PARTS = """\
name: both
probe:
  trials: 9
  parameters: {backbone: squeezenet1_1, image_size: 32, lr: {low: 0.01, high: 1}, epochs: 2}
finetune:
  trials: 5
  from_probes: 2
  sampler: random
  parameters: {backbone: squeezenet1_1, image_size: [32, 48], unfrozen_stages: [1, 2], epochs: 2}
"""
