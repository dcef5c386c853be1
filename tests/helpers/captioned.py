"""A small captioned data set of photographs."""

import json


def save_captioned_images(root, count=30, sizes=((16, 16), (12, 20), (20, 12))):
    """Crops of two photographs with captions, in three buckets; batches of 3 and 4."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    pictures = load_sample_images().images
    (root / "images").mkdir(parents=True)
    lines, members = [], {size: [] for size in sizes}
    for k in range(count):
        height, width = size = sizes[k % 3]
        crop = pictures[k % 2][5 * k : 5 * k + 4 * height, 7 * k : 7 * k + 4 * width]
        Image.fromarray(crop).save(root / "images" / f"{k}.png")
        captions = [f"a photo number {k}", "a flower" if k % 2 else "a temple", "a"]
        lines.append({"image_file": f"{k}.png", "bucket": f"set-{height}x{width}", "captions": captions})
        members[size].append(k)
    (root / "data_info.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    packed = [m[i : i + 4] for m in members.values() for i in range(0, len(m), 4)]
    (root / "bucket_sampler.json").write_text(json.dumps(packed))
