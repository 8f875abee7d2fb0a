"""Small tokenizers with chat templates as the families write them, and chats to render."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
PLAIN = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n\n{% endfor %}"
PLAIN += "{% if add_generation_prompt %}assistant:{% endif %}"
MARKED = (  # as ChatML, with the assistant's text marked, and the thoughts of earlier turns left out
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content.split('</think>')[-1] if not loop.last else message.content }}"
    "{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ message.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
)
REWRITING = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")

# Template, special tokens, end of text, what ends a turn of the assistant.
FAMILIES = {
    "chatml": (CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", "<|im_end|>"),
    "llama 3": (
        LLAMA_3,
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|end_of_text|>",
        "<|eot_id|>",
    ),
    "mistral": (MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"], "</s>", "</s>"),
    "marked": (MARKED, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|im_end|>"),
}
SAID = ["Paris.", "It lies on the Seine.\nAnd it is old: déjà vu 🙂."]
CHAT = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": SAID[0]},
    {"role": "user", "content": "  Tell me more about it, please!\n"},
    {"role": "assistant", "content": SAID[1]},
]
TEXTS = [message["content"] for message in CHAT] * 3 + ["system user assistant helpful You are . : \n\n"] * 3


def chat_tokenizer(family="chatml", kind="bytes", template=None, size=400):
    """A trained tokenizer of a family.

    `kind` is "bytes" (GPT-2's way), "first" or "always" (a space before the first text, or before every text between
    special tokens, as SentencePiece has it), or "prepend" (Llama 2's old way).
    """
    own_template, special, end, _ = FAMILIES[family]
    if kind == "bytes":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    else:
        backend = Tokenizer(models.BPE(unk_token="?"))
        if kind == "prepend":
            backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=True)
        backend.decoder = decoders.Metaspace()
        alphabet = sorted(set("".join(TEXTS)) | set(map(chr, range(32, 127))))
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, bos_token=special[0])
    tokenizer.chat_template = own_template if template is None else template
    return tokenizer
