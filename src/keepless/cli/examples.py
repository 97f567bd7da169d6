"""What stands at the end of each command's help: examples, and what its exit codes mean."""

from __future__ import annotations

_CODES = "Exit codes: 0 {good}, {more}2 bad usage, 130 ended by Ctrl-C, 1 any other error."
_INFEASIBLE = "3 the budget is infeasible, "

_EXAMPLES: dict[str, tuple[str, str, str]] = {
    "plan": (
        "keepless plan package.module:factory --budget 8GiB --save step.plan\n"
        "keepless plan hf:config.json --device rtx4090 -b 0.95 --dtype bfloat16",
        "it fits",
        _INFEASIBLE,
    ),
    "curve": (
        "keepless curve package.module:factory --release-outputs --picture curve.png\n"
        "keepless curve hf:config.json --device meta --save-at 8GiB -o step.plan",
        "the curve was made",
        "3 --save-at is infeasible, ",
    ),
    "fits": (
        "keepless fits hf:config.json -b 8GiB --max-batch\n"
        "keepless fits hf:config.json --device h100 --batch 1,2,4 --length 512,1024",
        "it fits",
        "3 it does not fit, or is too slow, ",
    ),
    "estimate": (
        "keepless estimate package.module:factory\nkeepless estimate hf:config.json --device meta --batch-size 4",
        "the estimate was made",
        "",
    ),
    "timeline": (
        "keepless timeline package.module:factory -b 8GiB --measure --trace step.json\nkeepless timeline step.plan",
        "the timeline was made",
        _INFEASIBLE,
    ),
    "train": (
        "keepless train package.module:factory -b 8GiB --steps 20\n"
        "keepless train hf:config.json --plan step.plan --accumulate 4",
        "it trained within the budget",
        _INFEASIBLE,
    ),
    "verify": (
        "keepless verify package.module:factory -b 8GiB\nkeepless verify package.module:factory --plan step.plan",
        "same bits, within the budget",
        _INFEASIBLE,
    ),
    "bench": (
        "keepless bench package.module:factory\nkeepless bench hf:config.json -b 2GiB -b 4GiB --rounds 20",
        "same bits, within every budget",
        "3 a budget is infeasible, ",
    ),
    "report": (
        "keepless report step.plan -o report.html\n"
        "keepless report package.module:factory -b 8GiB --measure --curve -o report.html",
        "the report was made",
        _INFEASIBLE,
    ),
    "show": (
        "keepless show step.plan --values\nkeepless show step.plan --export every-n-layers\n"
        "keepless show keepless-oom.json",
        "the file was shown",
        "",
    ),
    "diff": (
        "keepless diff before.plan after.plan\nkeepless diff before.plan after.plan --values --exit-code",
        "the plans were compared",
        "1 they differ and --exit-code asks for it, ",
    ),
    "demo": ("keepless demo\nkeepless demo --out demo --rounds 12 --json", "every promise was kept", ""),
    "env": ("keepless env\nkeepless env --json", "always", ""),
    "devices": ("keepless devices\nkeepless devices rtx4090 --json", "the device is known", ""),
    "solve": (
        "keepless solve graph.json --budget 0.8 -o program.txt\n"
        "keepless solve graph.json -b 8GiB --save step.plan --time-limit 60",
        "a program was found, by Ctrl-C, too",
        _INFEASIBLE,
    ),
    "check": (
        "keepless check graph.json program.txt --budget 0.8\nkeepless check step.plan",
        "the program keeps the rules, and the claims hold",
        "",
    ),
}


def epilog(command: str) -> str:
    """The end of a command's help, a paragraph per line."""
    examples, good, more = _EXAMPLES[command]
    lines = ["Examples:", *examples.splitlines(), _CODES.format(good=good, more=more)]
    return "\n\n".join(lines)
