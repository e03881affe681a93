#!/usr/bin/env bash
# Check, start the cluster, run, and end the cluster. From the checkout, with credentials of AWS and `pip install boto3`.
# The placement group must be there:
#     aws ec2 create-placement-group --group-name wuerstchen-stage-c --strategy cluster --region us-east-1
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
(($#)) || set -- conf=stage_c root=s3://my-bucket/wuerstchen scale=paper cluster=aws workers=64 tracking=server data.metadata=s3://my-bucket/laion-aesthetic text.clip_h.weights=s3://my-bucket/weights/CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors compressor.weights=s3://my-bucket/weights/efficientnet_v2_s-dd5fe13b.pth

python -m pipeline doctor --no-devices "$@" # before anything is allocated
ray get-auth-token --generate >/dev/null
export RAY_USAGE_STATS_ENABLED=0 # `ray up` tells the head what holds here, whatever the image says
ray up --yes "$here/cluster.yaml"
trap 'ray down --yes "$here/cluster.yaml"' EXIT
words=$(printf ' %q' "$@")
tries=0
until ray exec "$here/cluster.yaml" "cd /opt/wuerstchen && RAY_AUTH_MODE=token bash infra/final.sh python -m pipeline run$words"; do
    code=$?
    tries=$((tries + 1))
    ((code != 130 && code != 143 && tries <= 10)) || exit "$code" # stopped by a person, or often enough
done
