#!/usr/bin/env bash
# Check, then ask for the cluster. Run it where kubectl reaches yours, after the image is in its registry:
#     bash submit.sh [words of kubectl, such as --namespace=research]
set -euo pipefail
cd "$(dirname "$0")"
check=job/wuerstchen-stage-c-check

kubectl "$@" delete "$check" --ignore-not-found
kubectl "$@" create --filename check.yaml
ended=
until [[ -n $ended ]]; do
    sleep 2
    ended=$(kubectl "$@" get "$check" --output jsonpath='{.status.conditions[?(@.status=="True")].type}')
done
kubectl "$@" logs "$check"
if [[ $ended != *Complete* ]]; then
    echo "the run could not begin: see above; no cluster was asked for" >&2
    exit 2
fi
kubectl "$@" create --filename rayjob.yaml
