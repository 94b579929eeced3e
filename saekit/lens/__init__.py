"""Reading a model: what directions and features say of a text, and what features do to the logits.

reading          token by token, in colours
logit_lens       what each layer would say next
direct           a logit as the sum of its features' contributions, the final norm held fixed
patching         how far each feature moves a metric between two prompts, by gradients, the SAE's error beside them

TransformerLens's own tools are called where they take a model as it was published: its cache of activations, the residual
stream through the final norm, the unembedding. `direct_logit_attribution` asks for a bridge whose weights were folded
(`enable_compatibility_mode`), which changes the model and every SAE's activations with it, and `attribution_patch` knows
embeddings, heads and MLPs as nodes but no features: `direct` and `patching` are for the rest.
"""
