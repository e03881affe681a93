{% if pools | length > 1 %}
#!/usr/bin/env bash
# Submit the parts of the run, each after the one before it has ended well. From the checkout, after `make setup`:
#     bash submit.sh                 the run that it was rendered for
#     bash submit.sh conf=...        another one, in the words of `run`
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
before=()
for part in{% for pool in pools if pool != "workers" %} {{ pool }}{% endfor %} job; do
    number=$(sbatch --parsable --kill-on-invalid-dep=yes "${before[@]}" "$here/$part.sbatch" "$@")
    echo "$part: job $number"
    before=("--dependency=afterok:${number%%;*}")
done
{% endif %}
