"""What `python -m uae_jax.plan` is made of: machines, an abstract system, counts, the compiler's word, a roofline."""
