"""Random models of many architectures at toy size; a byte-level tokenizer with a chat template."""

from __future__ import annotations

import functools

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|bos|>", "<|start|>", "<|end|>"]
VOCAB = 256 + len(SPECIAL_TOKENS)

# Wide weights: logits of a few units, so that a wrong scale or softcap shows.
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
    initializer_range=0.3,
    bos_token_id=VOCAB - 3,
    eos_token_id=VOCAB - 1,
    pad_token_id=0,
)
WINDOW = 24

ARCHITECTURES = {
    "llama": dict(model_type="llama"),
    "qwen2": dict(model_type="qwen2"),
    "qwen3": dict(model_type="qwen3"),
    "gemma2": dict(model_type="gemma2", final_logit_softcapping=5.0, sliding_window=WINDOW),
    "gemma3": dict(
        model_type="gemma3_text",
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        # Tied to embeddings this wide, the head would only repeat the last token.
        tie_word_embeddings=False,
    ),
    "gemma3n": dict(
        model_type="gemma3n_text",
        final_logit_softcapping=2.0,
        num_hidden_layers=5,
        num_kv_shared_layers=0,
        activation_sparsity_pattern=None,
        laurel_rank=4,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB,
    ),
    "mistral": dict(model_type="mistral", sliding_window=WINDOW),
    "phi3": dict(model_type="phi3"),
    "gpt2": dict(model_type="gpt2"),
    "gpt_neox": dict(model_type="gpt_neox"),
    "cohere": dict(model_type="cohere", logit_scale=0.25),
    "falcon_h1": dict(
        model_type="falcon_h1",
        lm_head_multiplier=0.5,
        mamba_chunk_size=16,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_n_groups=1,
        mamba_d_state=8,
    ),
    "granite": dict(model_type="granite", logits_scaling=3.0),
}

# Masked tokens in the middle of a row change what these read, in four ways: a state under a name of
# its own, keys and values beside a state, biases and local windows that count slots.
PADDING_SENSITIVE = {
    "mamba": dict(model_type="mamba", state_size=8, tie_word_embeddings=False),
    "rwkv": dict(model_type="rwkv"),
    "minimax": dict(
        model_type="minimax",
        layer_types=["linear_attention", "full_attention"],
        num_local_experts=2,
    ),
    "mpt": dict(
        model_type="mpt",
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=512,
        tie_word_embeddings=False,
    ),
    "gpt_neo": dict(
        model_type="gpt_neo",
        attention_types=[[["global", "local"], 1]],
        num_layers=2,
        num_heads=4,
        window_size=WINDOW,
    ),
}

# All angles are others in a call of more than SWITCH tokens: between the lengths of toy_teacher's.
SWITCH = 100
SWITCHING = {
    "longrope": dict(
        model_type="phi3",
        original_max_position_embeddings=SWITCH,
        rope_parameters=dict(
            rope_type="longrope",
            rope_theta=10000.0,
            short_factor=[1.0] * 4,
            long_factor=[4.0] * 4,
            original_max_position_embeddings=SWITCH,
        ),
    ),
}

# Each layer reads an embedding of its own, which it looks up by the token's id.
PER_LAYER = {
    "gemma3n_per_layer": ARCHITECTURES["gemma3n"],
    "gemma4": dict(
        model_type="gemma4_text",
        final_logit_softcapping=2.0,
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB,
        sliding_window=WINDOW,
        global_head_dim=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
}

# A logit beside those of the keys takes a share of each head's attention.
SINKS = {
    "gpt_oss": dict(
        model_type="gpt_oss",
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        num_local_experts=2,
        num_experts_per_tok=1,
    )
}


def make_model(
    architecture: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **changes: object,
):
    """A random model in eval mode; the same one for the same arguments. changes: of its config."""
    torch.manual_seed(seed)
    own = (ARCHITECTURES | PADDING_SENSITIVE | SWITCHING | PER_LAYER | SINKS)[architecture]
    config = AutoConfig.for_model(**{**SIZES, **own, **changes})
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    if architecture == "gemma3n_per_layer":
        # Zero at the start of training: what a layer looks up by itself would not count.
        for layer in model.get_decoder().layers:
            torch.nn.init.ones_(layer.altup.correct_output_scale)
    return model


@functools.cache
def make_tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: index for index, token in enumerate(alphabet + SPECIAL_TOKENS)}
    core = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    bos, start, end = SPECIAL_TOKENS
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=bos,
        eos_token=end,
        extra_special_tokens=[start],
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
