"""Where tokens come from. Every engine offers `sample` and `load`; none of them knows how weights are trained."""
