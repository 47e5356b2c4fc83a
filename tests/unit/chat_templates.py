"""Chat templates in the style of well-known families, in as few lines as show what each reads and refuses."""

# Writes any role's name.
CHATML = r"""{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{{- '<|im_start|>assistant\n' if add_generation_prompt }}"""

# Reads system turns at the start and later, tool results, and reasoning_content of the turns after the last question.
QWEN3 = r"""{%- set ns = namespace(last_query=-1) %}
{%- for m in messages %}
    {%- if m.role == 'user' and not (m.content.startswith('<tool_response>')) %}
        {%- set ns.last_query = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- if tools %}<|im_start|>system
{{ messages[0].content + '\n' if messages[0].role == 'system' else '' }}{{ tools | tojson }}<|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set content = m.content %}
        {%- set reasoning = '' %}
        {%- if m.reasoning_content is string %}
            {%- set reasoning = m.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last_query and (loop.last or reasoning) %}
            {{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in m.tool_calls or [] %}
            {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user' if loop.first or messages[loop.index0 - 1].role != 'tool' }}
        {{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
        {{- '<|im_end|>\n' if loop.last or messages[loop.index0 + 1].role != 'tool' }}
    {%- endif %}
{%- endfor %}
{{- '<|im_start|>assistant\n' if add_generation_prompt }}"""

# Refuses a system turn, and roles that do not alternate.
GEMMA = r"""{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- set role = 'model' if m.role == 'assistant' else m.role %}
    {{- '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{{- '<start_of_turn>model\n' if add_generation_prompt }}"""

# Needs alternating turns apart from tools, and ids of nine characters.
MISTRAL = r"""{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- set turns = messages[1:] if system else messages %}
{%- set ns = namespace(index=0) %}
{%- for m in turns if m.role in ['user', 'assistant', 'system'] and not m.tool_calls %}
    {%- if (m.role == 'user') != (ns.index % 2 == 0) %}
        {{- raise_exception('After the optional system message, roles must alternate') }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for m in turns %}
    {%- if m.role == 'user' %}
        {{- '[INST]' + (system + '\n\n' if loop.first and system else '') + m.content + '[/INST]' }}
    {%- elif m.tool_calls is defined %}
        {%- for call in m.tool_calls %}
            {%- if call.id is not defined or call.id | length != 9 %}
                {{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}
            {%- endif %}
            {{- '[TOOL_CALLS]' + (call.function | tojson) + call.id }}
        {%- endfor %}
        {{- eos_token }}
    {%- elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}
    {%- elif m.role == 'tool' %}
        {%- if m.tool_call_id is not defined or m.tool_call_id | length != 9 %}
            {{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}
        {%- endif %}
        {{- '[TOOL_RESULTS]' + m.content + m.tool_call_id + '[/TOOL_RESULTS]' }}
    {%- else %}{{ raise_exception('Only user, assistant, system and tool roles are supported') }}
    {%- endif %}
{%- endfor %}"""

# Takes the system text from wherever it stands, drops roles that it does not know, and cuts off reasoning.
DEEPSEEK_R1 = r"""{%- set ns = namespace(system='') %}
{%- for m in messages if m.role == 'system' %}{% set ns.system = m.content %}{% endfor %}
{{- bos_token + ns.system }}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{ '<|User|>' + m.content }}
    {%- elif m.role == 'assistant' and m.content is not none %}
        {{- '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}
    {%- elif m.role == 'tool' %}{{ '<|tool_output|>' + m.content }}
    {%- endif %}
{%- endfor %}
{{- '<|Assistant|><think>\n' if add_generation_prompt }}"""

# Knows the role developer, and names reasoning otherwise.
HARMONY = r"""{%- for m in messages %}
    {%- if m.role in ['system', 'developer'] %}
        {{- '<|start|>developer<|message|># Instructions\n' + m.content + '<|end|>' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' if m.thinking }}
        {{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}
    {%- elif m.role == 'tool' %}{{ '<|start|>functions to=assistant<|message|>' + m.content + '<|end|>' }}
    {%- else %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{{- '<|start|>assistant' if add_generation_prompt }}"""

# Knows developer and user.
DEVELOPER = r"""
{%- for m in messages if m.role in ['developer', 'user', 'assistant'] %}
    {{- '<' + m.role + '>' + m.content }}
{%- endfor %}"""
