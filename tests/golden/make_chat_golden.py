"""Writes `chat.json` beside it: conversations as transformers renders them.

Run by hand in an environment with transformers and tokenizers:

    python tests/golden/make_chat_golden.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

HERE = Path(__file__).parent

LLAMA3 = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%Y") | length %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nDigits of the year: " + date_string|string }}
{{- "\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

CHATML = """\
{%- if tools %}
    {{- raise_exception('no tools') }}
{%- endif %}
{% for message in messages %}
    {% if loop.first and message.role != 'system' %}
{{ '<|im_start|>system\\nBe of help.<|im_end|>\\n' }}
    {%- endif %}
    {% if message.content is none %}
        {% continue %}
    {% endif %}
    {% if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {{- message.content + '<|im_end|>\\n' }}
        {%- endgeneration %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
    {%- if message.name is defined %}
        {{- message | tojson }}
    {%- endif %}
{% endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

MISTRAL = """\
{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- else %}{{ ' ' + message['content'] + eos_token }}{% endif %}
{% endfor %}
"""

QWEN3 = """\
{%- set ns = namespace(last=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if message.role == 'user' and ns.last == messages | length - 1 %}
        {%- set ns.last = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.index0 > ns.last %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
    {{- message.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

TEMPLATES = {"llama3": LLAMA3, "chatml": CHATML, "mistral": MISTRAL, "qwen3": QWEN3}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TALK = [
    {"role": "user", "content": " What is <b>2 + 2</b>? "},
    {"role": "assistant", "content": "4.\n"},
    {"role": "user", "content": "Merci, c'était l'été…"},
    {"role": "assistant", "content": "De rien"},
]
CONVERSATIONS = {
    "talk": TALK,
    "question": TALK[:3],
    "system": [{"role": "system", "content": "Be brief.", "name": "naïve & <co>"}, *TALK[:2]],
}


def rendered(template: str) -> list[dict]:
    cases = []
    with tempfile.TemporaryDirectory() as directory:
        vocabulary = {token: i for i, token in enumerate((*TOKENS.values(), "<unk>"))}
        Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")).save(
            f"{directory}/tokenizer.json"
        )
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template} | TOKENS
        Path(directory, "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = AutoTokenizer.from_pretrained(directory)
    for name, messages in CONVERSATIONS.items():
        for prompt in (False, True):
            try:
                text = tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=prompt
                )
            except Exception as error:
                text = None
                print(name, "refused:", error)
            cases.append({"conversation": name, "add_generation_prompt": prompt, "text": text})
    return cases


if __name__ == "__main__":
    golden = {
        "tokens": TOKENS,
        "conversations": CONVERSATIONS,
        "templates": {
            name: {"source": source, "cases": rendered(source)}
            for name, source in TEMPLATES.items()
        },
    }
    (HERE / "chat.json").write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")
