"""Completion in bash: typer's code with what bash needs besides.

Bash takes `package.module:factory` and `--engine=graph` for several words, and puts a space behind whatever it
completes.
"""

from __future__ import annotations

import contextlib

BASH = r"""
%(complete_func)s() {
    local -a words=()
    local -i index here=0
    local word line previous="" cut=""
    for ((index = 0; index <= COMP_CWORD; index++)); do
        word=${COMP_WORDS[index]}
        line=${COMP_LINE:0:COMP_POINT}
        # Words around : and = are one, but for an empty one behind a space.
        if ((index > 1)) && [[ $word == [:=] || $previous == *[:=] ]] &&
            ! [[ $index == "$COMP_CWORD" && -z $word && $line == *[[:space:]] ]]; then
            words[here]+=$word
        else
            here=${#words[@]}
            words[here]=$word
        fi
        previous=$word
    done
    word=${words[here]}
    # Bash puts what is found in the place of what stands behind the last colon.
    [[ $word == *:* && $COMP_WORDBREAKS == *:* ]] && cut=${word%%"${word##*:}"}
    cut=${cut#*=}
    COMPREPLY=()
    while IFS= read -r line || [[ -n $line ]]; do
        [[ -n $line ]] || continue
        line=${line#"$cut"}
        [[ $line == *[[:space:]]* ]] && printf -v line %%q "$line"
        COMPREPLY+=("$line")
    done < <(
        IFS=$'\n'
        env COMP_WORDS="${words[*]}" COMP_CWORD="$here" %(autocomplete_var)s=complete_bash "$1" 2>/dev/null
    )
    # What goes on, a folder or a module, gets no space.
    [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *[:/.] ]] && compopt -o nospace 2>/dev/null
    return 0
}

complete -o default -F %(complete_func)s %(prog_name)s
"""


def use() -> None:
    """Typer prints and installs this code for bash; its own where its table of scripts stands somewhere else."""
    with contextlib.suppress(ImportError, AttributeError):
        from typer import _completion_classes, _completion_shared

        scripts = _completion_shared._completion_scripts
        if "bash" in scripts:
            scripts["bash"] = BASH
            _completion_classes.BashComplete.source_template = BASH
