"""Group relative policy optimization: a policy that learns from its own attempts."""
