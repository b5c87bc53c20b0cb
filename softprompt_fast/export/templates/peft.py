import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
# {% if text is none %}
from softprompt_fast.data.chat_template import bind_template
from softprompt_fast.data.queries import tokenize_query
# {% endif %}

question = "Hi"
tokenizer = AutoTokenizer.from_pretrained({{ model_name | repr }})
base = AutoModelForCausalLM.from_pretrained({{ model_name | repr }}, dtype={{ dtype | repr }})
base.generation_config = GenerationConfig(eos_token_id={{ end_ids }}, pad_token_id={{ pad_id }})
model = PeftModel.from_pretrained(base, {{ path | repr }})

# {% if text is none %}
bind_template(tokenizer, **{{ template | repr }})
query = tokenize_query(tokenizer, [{"role": "user", "content": question}], "")
ids = torch.tensor([query.after])
# {% else %}
text = {{ text | repr }}.replace({{ placeholder | repr }}, question)
ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
# {% endif %}
written = model.generate(
    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens={{ max_new_tokens }},
    do_sample=False, use_cache=False,
)
print(tokenizer.decode(written[0, ids.shape[1]:], skip_special_tokens=True))
