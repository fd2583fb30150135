"""Photographs and recorded sounds of Debian's tuxpaint-stamps-default in the layout of Multi-sources, 128 pixels."""

stamps = dict(tasks=["ms3"], out="data/stamps", size=128, kinds=12)
dataset = {
    split: dict(
        type="MS3Dataset",
        split=split,
        anno_csv="data/stamps/Multi-sources/ms3_meta_data.csv",
        dir_img="data/stamps/Multi-sources/ms3_data/visual_frames",
        dir_audio_log_mel="data/stamps/Multi-sources/ms3_data/audio_log_mel",
        dir_mask="data/stamps/Multi-sources/ms3_data/gt_masks",
        img_size=(128, 128),
        batch_size=2,
        flip=split == "train",
    )
    for split in ("train", "val", "test")
}
