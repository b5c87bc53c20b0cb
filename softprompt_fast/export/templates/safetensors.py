from safetensors import safe_open

with safe_open({{ path | repr }}, "pt") as file:
    prompt, facts = file.get_tensor("prompt_embeddings"), file.metadata()
