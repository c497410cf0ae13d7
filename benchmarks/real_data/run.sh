#!/usr/bin/env bash
# The runs on real images that docs/results.md reports. Usage: benchmarks/real_data/run.sh OUTPUT_FOLDER [DATA_FOLDER]
# Needs the development data (MSD layout); everything is resumed if it is called again.
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=$1
DATA=${2:-../shared/data}
PRETRAIN="['bundles/tsfm_pretrain/configs/train.json','bundles/tsfm_pretrain/configs/small.json','benchmarks/real_data/overlay.json']"
EVALUATE="['bundles/tsfm_pretrain/configs/inference.json','bundles/tsfm_pretrain/configs/evaluate.json']"
pretrain() {
    python -m monai.bundle run --config_file "$PRETRAIN" --bundle_root bundles/tsfm_pretrain --dataset_dir "$DATA" \
        --store_dir "$OUT/store" --output_dir "$OUT/$1" --ckpt_dir "$OUT/$1/published" "${@:2}"
}

# 1. The whole pool, and its held-out cases.
pretrain pool --epochs 32
python -m monai.bundle run --config_file "$EVALUATE" --bundle_root bundles/tsfm_pretrain --dataset_dir "$DATA" \
    --pool_file benchmarks/real_data/pool.json --splits_file benchmarks/real_data/splits.json \
    --checkpoint "$OUT/pool/model.pt" --output_dir "$OUT/pool/evaluation" --progress False

python -m tsfm release --bundle_dir bundles/tsfm_pretrain --checkpoint "$OUT/pool/model.pt" --output_dir "$OUT/dist" \
    --overlays "['small.json']" --metrics "$OUT/pool/evaluation/summary.json" \
    --data_license benchmarks/real_data/data_license.txt --trained_on \
    "45 images of soft-tissue sarcoma, 138 of the hippocampus and one abdominal CT, for minutes: an example; no organ is learnt"

# 2. The pool without hippocampus, and its transfer to hippocampus and to sarcoma MR, against from scratch, three seeds.
pretrain without_hippocampus --datasets "['sarcoma_ct','sarcoma_mr','totalseg_sample']"
python -m tsfm transfer_table --pretrained "$OUT/without_hippocampus/model.pt" --dataset_dir "$DATA/Task004_Hippocampus" \
    --output_dir "$OUT/hippocampus" --epochs "[1,2,4,10]" --seeds "[0,1,2]" --overlays "['small.json']" --name hippocampus \
    --splits_file benchmarks/real_data/splits_hippocampus.json --num_workers 1
python benchmarks/real_data/parts.py "$OUT/without_hippocampus/model.pt" "$OUT/parts"
python -m tsfm table3 --grid benchmarks/real_data/parts.json --dataset_dir "$DATA" --output_dir "$OUT/which_part" \
    --weights "{'encoder': '$OUT/parts/encoder.pt', 'bottleneck': '$OUT/parts/bottleneck.pt',
                'decoder': '$OUT/parts/decoder.pt', 'shuffled': '$OUT/parts/shuffled.pt'}" --overlays "['small.json']" \
    --splits_file benchmarks/real_data/splits_hippocampus.json --num_workers 1
python -m tsfm transfer_table --pretrained "$OUT/without_hippocampus/model.pt" --dataset_dir "$DATA/Task902_SarcomaMR" \
    --output_dir "$OUT/sarcoma_mr" --epochs "[1,10]" --seeds "[0,1,2]" --overlays "['small.json']" --name "sarcoma MR" \
    --splits_file benchmarks/real_data/splits_sarcoma_mr.json --spacing_mm checkpoint \
    --patch_size "[32,64,64]" --num_workers 1

# 3. Which pool: the same budget on sarcoma CT alone.
pretrain sarcoma_ct_only --datasets "['sarcoma_ct']"
python -m tsfm table3 --grid benchmarks/real_data/ablation.json --dataset_dir "$DATA" --output_dir "$OUT/ablation" \
    --weights "{'pool': '$OUT/without_hippocampus/model.pt', 'sarcoma_ct': '$OUT/sarcoma_ct_only/model.pt'}" \
    --overlays "['small.json']" --splits_file benchmarks/real_data/splits_sarcoma_mr.json --spacing_mm checkpoint \
    --patch_size "[32,64,64]" --num_workers 1

# 4. A fine-tuning release. Its zips go through the gate and a MONAI Label server (docs/monai_label.md).
python -m tsfm release --bundle_dir bundles/tsfm_finetune --checkpoint "$OUT/hippocampus/cells/pretrained-10epochs-seed0/model.pt" \
    --output_dir "$OUT/dist" --overlays "['small.json']" --data_license benchmarks/real_data/data_license.txt \
    --trained_on "138 MR of the hippocampus (MSD Task04), 250 iterations: an example"
python -m tsfm gate --bundle_dir "$OUT/dist/tsfm_pretrain"
python -m tsfm gate --bundle_dir "$OUT/dist/tsfm_finetune"
