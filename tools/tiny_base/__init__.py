"""Makes the tiny base: a dense LLaVA small enough to be trained on two cores, in the place of LLaVA-1.5-7B."""
