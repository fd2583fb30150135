"""Photographs and recorded sounds of Debian's tuxpaint-stamps-default in the layout of Single-source, 128 pixels."""

stamps = dict(tasks=["s4"], out="data/stamps", size=128, kinds=12)
dataset = {
    split: dict(
        type="S4Dataset",
        split=split,
        anno_csv="data/stamps/Single-source/s4_meta_data.csv",
        dir_img="data/stamps/Single-source/s4_data/visual_frames",
        dir_audio_log_mel="data/stamps/Single-source/s4_data/audio_log_mel",
        dir_mask="data/stamps/Single-source/s4_data/gt_masks",
        img_size=(128, 128),
        batch_size=2,
        flip=split == "train",
    )
    for split in ("train", "val", "test")
}
