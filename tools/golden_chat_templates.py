#!/usr/bin/env python3
"""Writes tests/golden/chat/templates.json: chat templates in the style of well-known models, and what transformers
renders of them.

Made with transformers 5.23.0 and jinja2 3.1.6. Run from the repository's root: python tools/golden_chat_templates.py
"""

import json
from pathlib import Path

import jinja2
import transformers
from transformers.utils.chat_template_utils import render_jinja_template

OUT = Path("tests/golden/chat/templates.json")

CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You answer briefly.<|im_end|>
' }}{% endif %}{{ '<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

LLAMA_2 = """{% if messages[0]['role'] == 'system' %}
{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}
{% else %}
{% set loop_messages = messages %}{% set system_message = false %}
{% endif %}
{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate: user, assistant, user, assistant') }}
    {% endif %}
    {% if loop.index0 == 0 and system_message != false %}
        {% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
    {% else %}
        {% set content = message['content'] %}
    {% endif %}
    {% if message['role'] == 'user' %}
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}
{{ ' ' + content.strip() + ' ' + eos_token }}
    {%- endif %}
{% endfor %}"""

LLAMA_3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {%- for call in message.tool_calls %}
            {{- '{"name": "' + call.function.name + '", "parameters": ' + call.function.arguments | tojson + '}' }}
        {%- endfor %}
        {{- "<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" + message.content | tojson(indent=2) + "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("After the optional system message, roles must alternate user/assistant") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + " [/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + " [/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported") }}
    {%- endif %}
{%- endfor %}
"""

LLAVA = """{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}\
{# Pictures first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}\
{% endfor %}{# then text #}{% if message['role'] != 'assistant' %}\
{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}\
{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}\
{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""

# Things that templates do with Python's methods, filters and loop controls.
PYTHON = """{%- macro heading(role) %}{{ role.title() }}{% endmacro %}
{%- for message in messages %}
    {%- if message.content.startswith('skip') %}
        {%- continue %}
    {%- endif %}
    {%- if message.content == 'stop' %}
        {%- break %}
    {%- endif %}
    {{- heading(message.role) ~ ' (' ~ loop.index ~ '): ' }}
    {%- for key, value in message.items() %}
        {{- key ~ '=' ~ value | string | length }}{{ ', ' if not loop.last }}
    {%- endfor %}
    {{- '\\n' + message.content.strip().replace('a', 'A').split(' ')[-1] + '\\n' }}
    {{- none }} {{ true }} {{ [1, 'x', 2.5] }} {{ message | tojson }}
{% endfor %}
{{- strftime_now('%Y') | length }}{% if add_generation_prompt %}Assistant:{% endif %}
"""

# Writes only the last answer's thoughts, so that a text for fewer messages is not the beginning of that for more.
FORGETFUL = """{% for message in messages %}{{ message.role }}: {{ message.content.split('</think>')[-1] \
if not loop.last else message.content }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""

TALK = [("user", "What is\\nthis?"), ("assistant", "  A red bus, or \"two\".  "), ("user", " Why? "), ("assistant", "Größe 大 🙂")]
SYSTEM = [("system", " Be kind. ")]
TOOLS = [{"role": "user", "content": "Sum"}, {"role": "assistant", "tool_calls": [
    {"function": {"name": "add", "arguments": {"b": [1, 2.5, None], "a": {"<x>": True}, "c": "é'\"\n"}}}]},
    {"role": "tool", "content": {"z": [], "y": {}, "x": [1, {"w": "é"}]}}]
IMAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
          {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
          {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
          {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]}]


def plain(turns):
    return [{"role": role, "content": text} for role, text in turns]


def template(name, source, conversations, bos="<s>", eos="</s>"):
    tokens = {"bos_token": bos, "eos_token": eos}
    cases = []
    for messages in conversations:
        for prompt in (False, True):
            case = {"messages": messages, "add_generation_prompt": prompt}
            try:
                rendered, spans = render_jinja_template(
                    conversations=[messages], chat_template=source, add_generation_prompt=prompt,
                    return_assistant_tokens_mask="endgeneration" in source and not prompt, **tokens)
                case["text"] = rendered[0]
                if spans and spans[0]:
                    case["generation"] = [[len(rendered[0][:at].encode()) for at in span] for span in spans[0]]
            except jinja2.exceptions.TemplateError as error:
                case["error"] = str(error)
            cases.append(case)
    return {"name": name, "template": source, "tokens": tokens, "cases": cases}


def main():
    talks = [plain(TALK), plain(SYSTEM + TALK[:2]), plain(TALK[:1]), plain(TALK[:3])]
    wrong = plain([TALK[0], TALK[0]])
    templates = [
        template("chatml", CHATML, talks, "<|im_start|>", "<|im_end|>"),
        template("llama_2", LLAMA_2, talks + [wrong]),
        template("llama_3", LLAMA_3, talks + [TOOLS], "<|begin_of_text|>", "<|eot_id|>"),
        template("mistral", MISTRAL, talks + [wrong]),
        template("llava", LLAVA, [IMAGES, IMAGES[:1]]),
        template("python", PYTHON, [plain([("user", "skip this"), ("user", "say a word"), ("assistant", " 'tis a bAnana "),
                                           ("user", "stop"), ("assistant", "never")])]),
        template("forgetful", FORGETFUL, [plain([("user", "q"), ("assistant", "<think>x</think>a"), ("user", "r"),
                                                 ("assistant", "b")])]),
    ]
    OUT.parent.mkdir(parents=True, exist_ok=True)
    versions = {"transformers": transformers.__version__, "jinja2": jinja2.__version__}
    OUT.write_text(json.dumps({"versions": versions, "templates": templates}, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
