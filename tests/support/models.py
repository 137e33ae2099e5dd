"""Models of transformers small enough for a test, with random weights that are always the same."""

import inspect

import torch
import transformers as hf

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What configurations call them.
SPELLINGS = {
    "hidden_size": "n_embd d_model emb_dim word_embed_proj_dim",
    "intermediate_size": "ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff d_inner dim_ff",
    "num_hidden_layers": "n_layer n_layers num_layers num_blocks encoder_layers decoder_layers "
    "num_encoder_layers num_decoder_layers",
    "num_attention_heads": "n_head n_heads num_heads attention_heads encoder_attention_heads "
    "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads",
    "max_position_embeddings": "n_positions max_target_positions",
}


def tiny_config(name, **settings):
    """The configuration of transformers' class of this name; ``settings`` go before SIZES."""
    kind = getattr(hf, name)
    known = inspect.signature(kind).parameters
    sizes = {size: settings.pop(size, value) for size, value in SIZES.items()}
    spelt = {
        spelling: value
        for size, value in sizes.items()
        for spelling in (size, *SPELLINGS.get(size, "").split())
        if spelling in known
    }
    return kind(**spelt | settings)


def tiny(name, **settings):
    """A model of transformers' class of this name, in ``train()`` mode.

    ``dtype`` and ``..._implementation`` are for the model, other settings for its configuration.
    """
    options = {k: settings.pop(k) for k in list(settings) if k.endswith("_implementation")}
    options |= {"dtype": settings.pop("dtype", torch.float32)}
    kind = getattr(hf, name)
    torch.manual_seed(0)
    config = tiny_config(kind.config_class.__name__, **settings)
    return kind._from_config(config, **options).train()
