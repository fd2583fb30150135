"""All 62 kinds of stamps in the layout of Multi-sources, 224 pixels."""

stamps = dict(tasks=["ms3"], out="data/stamps_62", size=224, kinds=62, clips=[1000, 100, 200])
dataset = {
    split: dict(
        type="MS3Dataset",
        split=split,
        anno_csv="data/stamps_62/Multi-sources/ms3_meta_data.csv",
        dir_img="data/stamps_62/Multi-sources/ms3_data/visual_frames",
        dir_audio_log_mel="data/stamps_62/Multi-sources/ms3_data/audio_log_mel",
        dir_mask="data/stamps_62/Multi-sources/ms3_data/gt_masks",
        img_size=(224, 224),
        batch_size=2,
        flip=split == "train",
    )
    for split in ("train", "val", "test")
}
