"""Group relative policy optimization: a policy that learns from its own attempts.

`stage` sets a run up; `task` tells a step: `prompts`, `rollout`, `rewards`, then `loss`.
"""
