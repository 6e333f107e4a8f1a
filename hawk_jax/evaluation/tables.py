"""Results as plain text: what `evaluate` prints and keeps as results.txt."""

ROWS = (("model", "model"), ("shuffled", "clips shuffled"), ("constant", "best constant"),
        ("constant_per_question", "best constant per question"))
COLUMNS = (("bleu_1", "BLEU-1"), ("bleu_2", "BLEU-2"), ("bleu_3", "BLEU-3"), ("bleu_4", "BLEU-4"), ("exact", "exact"))
KINDS = {"one_reference": "descriptions against the one drawn reference", "all_references": "descriptions against all right sentences"}


def figure(value: float | None, column: str = "") -> str:
    """BLEU with one decimal on its scale of 100, shares with two; a dash where there is nothing to count."""
    return "-" if value is None else f"{value:.1f}" if column.startswith("bleu") else f"{value:.2f}"


def ratio(table: dict, control: str) -> float | None:
    """BLEU-4 of the model over that of a control; None where the control has none."""
    return table["model"]["bleu_4"] / table[control]["bleu_4"] if table[control]["bleu_4"] > 0 else None


def score_table(title: str, table: dict) -> list[str]:
    lines = [f"{title:48}" + "".join(f"{name:>8}" for _, name in COLUMNS)]
    lines += [f"  {name:46}" + "".join(f"{figure(table[key][c], c):>8}" for c, _ in COLUMNS) for key, name in ROWS if key in table]
    if (times := ratio(table, "shuffled")) is not None:
        lines.append(f"  BLEU-4 is {times:.1f} x that of shuffled clips")
    return [*lines, ""]


def class_table(classes: dict) -> list[str]:
    """Class, colour and place scores, pairs, and classes below full recall."""
    lines = [f"class named {figure(classes['right'])} (chance {figure(classes['chance'])}, shuffled {figure(classes['shuffled_right'])})"
             f" · macro recall {figure(classes['macro_recall'])} · colour {figure(classes['colour'])} · place {figure(classes['place'])}"
             f" · no class or several {figure(classes['unnamed'])} · {classes['clips']} clips"]
    for pair in classes["pairs"]:
        lines.append(f"  {' / '.join(pair['pair']):38} only {pair['only']:11} right {figure(pair['right'])}  "
                     f"taken for the other {figure(pair['swapped'])}  ({pair['clips']} clips)")
    missed = {name: c["recall"] for name, c in classes["per_class"].items() if c["recall"] < 1}
    lines.append("  recall below 1: " + (", ".join(f"{n} {figure(r)}" for n, r in sorted(missed.items(), key=lambda x: x[1])) or "none"))
    return [*lines, ""]


def results_text(results: dict) -> str:
    """All tables of a results dict."""
    lines = [f"{results['run']} on {results['clips']} clips of split {results['split']}; {results['bleu']}", ""]
    for kind, title in KINDS.items():
        if kind in results["descriptions"]:
            lines += score_table(title, results["descriptions"][kind])
    if "answers" in results:
        lines += score_table(f"answers to {results['answers']['answers']} questions", results["answers"])
    if "classes" in results:
        lines += class_table(results["classes"])
    return "\n".join(lines)
