"""Jinja chat templates in the shapes that families of models have, with what an engine must know of each."""

from __future__ import annotations

_TURN = "'<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n'"
_OPEN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
_ALTERNATE = (
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
)

CHATML = "{% for m in messages %}{{ " + _TURN + " }}{% endfor %}" + _OPEN
LEARNED = {
    "chatml": CHATML,
    "chatml with a default system prompt": (
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
        "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}{{ "
        + (_TURN + " }}{% endfor %}")
    )
    + _OPEN,
    "llama 2": (
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set s = messages[0]['content'] %}"
        "{% else %}{% set rest = messages %}{% set s = '' %}{% endif %}{% for m in rest %}" + _ALTERNATE + ""
        "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' }}{% if loop.first and s %}"
        "{{ '<<SYS>>\\n' + s + '\\n<</SYS>>\\n\\n' }}{% endif %}{{ m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama 3": (
        "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}" + _ALTERNATE + "{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token + ' ' }}{% endif %}"
        "{% endfor %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' "
        "+ m['content'] + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
    "phi": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "zephyr": (
        "{% for m in messages %}\n{% if m['role'] == 'user' %}\n{{ '<|user|>\\n' + m['content'] + eos_token }}\n"
        "{% elif m['role'] == 'system' %}\n{{ '<|system|>\\n' + m['content'] + eos_token }}\n"
        "{% elif m['role'] == 'assistant' %}\n{{ '<|assistant|>\\n' + m['content'] + eos_token }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
    ),
    "alpaca": (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '### Instruction:\\n' + m['content'] + '\\n\\n' }}"
        "{% elif m['role'] == 'assistant' %}{{ '### Response:\\n' + m['content'] + '\\n\\n' }}"
        "{% elif m['role'] == 'system' %}{{ m['content'] + '\\n\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
    ),
    "falcon": (
        "{% for m in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
        "{% if m['role'] == 'system' %}{{ 'System: ' }}{% elif m['role'] == 'user' %}{{ 'User: ' }}"
        "{% else %}{{ 'Falcon: ' }}{% endif %}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\\nFalcon:' }}{% endif %}"
    ),
    "command r": (
        "{{ bos_token }}{% if messages[0]['role'] != 'system' %}"
        "{{ '<|START|><|SYSTEM|>You are Command-R.<|END|>' }}{% endif %}{% for m in messages %}"
        "{{ '<|START|><|' + ('CHATBOT' if m['role'] == 'assistant' else m['role'] | upper) + '|>' + m['content'] "
        "+ '<|END|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|START|><|CHATBOT|>' }}{% endif %}"
    ),
    "deepseek, which opens a thought": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
        "{% elif m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
        "{% else %}{{ '<｜Assistant｜>' + m['content'].split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
    ),
    "one that ignores a system message": (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'Q: ' + m['content'] + '\\n' }}"
        "{% elif m['role'] == 'assistant' %}{{ 'A: ' + m['content'] + '\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
    ),
    "one whose texts look like actions": (
        "{% for m in messages %}{{ '{{ .Role }} ' + m['role'] + ' `\"\"\"`\\\\ }}\\n' + m['content'] }}"
        "{{ '{{- end }}\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant \u00a0\\t{{ if }}\\x00' }}{% endif %}"
    ),
    "one that takes contents as parts": (
        "{% for m in messages %}{{ '<' + m['role'] + '>' }}{% for p in m['content'] %}{% if p['type'] == 'text' %}"
        "{{ p['text'] }}{% endif %}{% endfor %}{{ '</>' }}{% endfor %}{{ '<assistant>' }}"
    ),
    "vicuna": (
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{{ messages[0]['content'] + ' ' }}"
        "{% else %}{% set rest = messages %}{{ 'A chat between a user and an assistant. ' }}{% endif %}"
        "{% for m in rest %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
        "{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
}  # fmt: skip
REFUSED = {
    "one that trims": (
        "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] | trim }}{% endfor %}",
        "trims",
    ),
    "one that trims answers": (
        "{% for m in messages %}{{ '<' + m['role'] + '>' }}{% if m['role'] == 'assistant' %}{{ m['content'].strip() }}"
        "{% else %}{{ m['content'] }}{% endif %}{% endfor %}",
        "trims the contents of the assistant",
    ),
    "one that counts turns": (
        "{% for m in messages %}{{ '[Round ' ~ loop.index0 // 2 ~ ']' + m['role'] + ':' + m['content'] }}{% endfor %}",
        "turn|roles",
    ),
    "one that counts from the end": (
        "{% for m in messages %}{{ m['role'] + loop.revindex | string + m['content'] }}{% endfor %}",
        "turn",
    ),
    "one that moves the system message": (
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set s = messages[0]['content'] %}"
        "{% else %}{% set rest = messages %}{% set s = '' %}{% endif %}{% for m in rest %}{% if m['role'] == 'user' %}"
        "{{ '[INST]' }}{% if loop.last and s %}{{ s + '\\n\\n' }}{% endif %}{{ m['content'] + '[/INST]' }}"
        "{% else %}{{ m['content'] + '</s>' }}{% endif %}{% endfor %}",
        "moves",
    ),
    "one with today's date": (
        "{{ 'Today: ' + strftime_now('%d %b %Y') + '\\n' }}{% for m in messages %}"
        "{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}",
        "today's date",
    ),
    "one that escapes": (
        "{% for m in messages %}{{ m['role'] + m['content'] | tojson }}{% endfor %}",
        "changes the text",
    ),
    "one that leaves answers out": (
        "{% for m in messages if m['role'] != 'assistant' %}{{ m['content'] + ';' }}{% endfor %}",
        "leaves out .* of the assistant",
    ),
    "one that refuses everything": ("{{ raise_exception('no') }}", "refuses"),
}  # fmt: skip
