"""Raw datasets of the Hub to prompt datasets: `camopd data general|medical|roleplay`.

A builder reads its sources as streams, keeps what makes a prompt, and writes a folder with JSONL files (columns `prompt`,
`category`, `source`, `id`) and a data card, `README.md`, that says what was kept, what was dropped and why. Left out on
purpose: tokenizers (lengths are in characters), answers (no gold answer is read further than its column), and a builder
for data that has a column `prompt` or `messages` already (`camopd.files.load_prompts` reads those).
"""
