"""The pages docs/troubleshooting*.md, written from the catalogue of findings.

`python -m onecard.observe.troubleshooting` writes them, in the root of the repository.
"""

from pathlib import Path

from onecard.observe.detectors.catalogue import Entry, Language, entries, sections

PAGES: dict[Language, str] = {"en": "troubleshooting.md", "zh": "troubleshooting.zh-CN.md"}

_INTRODUCTIONS: dict[Language, tuple[str, ...]] = {
    "en": (
        "# Troubleshooting",
        "By symptom. A run watches itself: what it finds is printed once, when it is sure, with the figures that show "
        "it, a setting to change, and what to expect of that: in figures where the plan or the run has some, else as "
        'here; it stands in `events.jsonl` (`"event": "finding"`, by the names below) and in the '
        "report of the run, and the console names at the end what it has said since the start or the resume. Those "
        "marked with * are what a run looks out for; the others are said where they happen: by errors, "
        "and by a run that goes on in spite of them. "
        "[中文](troubleshooting.zh-CN.md)",
    ),
    "zh": (
        "# 疑难解答",
        "按症状查找。训练会自我监控：确定之后只提示一次，给出依据的数字、该改的设置和预期效果"
        "（计划或运行有数字时给出数字，否则如下文）；同时写入 `events.jsonl`"
        '（`"event": "finding"`，名称如下）和运行报告，'
        "结束时终端再列出本次开始或继续以来提示过的。带 * 的由训练自己监控发现，"
        "其余在发生之处说明：报错信息，或训练继续时的提示。"
        "[English](troubleshooting.md)",
    ),
}
_LABELS: dict[Language, tuple[str, str, str]] = {
    "en": ("Likely cause", "Remedy", "Effect"),
    "zh": ("可能原因", "解决办法", "效果"),
}


def render(language: Language) -> str:
    """Writes one page as Markdown."""
    parts = list(_INTRODUCTIONS[language])
    for section, titles in sections().items():
        parts.append(f"## {titles[language]}")
        parts += [_paragraph(entry, language) for entry in entries().values() if entry.section == section]
    return "\n\n".join(parts) + "\n"


def write_pages(folder: Path) -> None:
    """Writes the pages of all languages into a folder."""
    for language, name in PAGES.items():
        (folder / name).write_text(render(language), encoding="utf-8", newline="\n")


def _paragraph(entry: Entry, language: Language) -> str:
    text, (cause, remedy, effect) = entry.texts[language], _LABELS[language]
    mark, colon, stop = (" *" if entry.has_detector else ""), *((": ", ".") if language == "en" else ("：", "。"))
    expected = [f"- {effect}{colon}{text.effect}{stop}"] if text.effect else []
    return "\n".join(
        (
            f"### {entry.id}{mark}",
            "",
            f"**{_begin_sentence(text.symptom, language)}{stop}**",
            "",
            f"- {cause}{colon}{text.cause}{stop}",
            f"- {remedy}{colon}{text.remedy}{stop}",
            *expected,
        )
    )


def _begin_sentence(text: str, language: Language) -> str:
    """Gives an English sentence its capital, unless it begins with a name such as nvidia-smi, torch.compile or fp16."""
    first = text.split()[0]
    is_name = any(letter in ".-" or letter.isdigit() for letter in first)
    return text if language == "zh" or is_name else text[0].upper() + text[1:]


if __name__ == "__main__":
    write_pages(Path("docs"))
