"""Images that the tools read or compose."""

from timm.data.readers.img_extensions import add_img_extensions

# timm's folders know .png, .jpg and .jpeg alone and leave other images out without a word.
add_img_extensions(('.bmp', '.pgm', '.ppm', '.tif', '.tiff', '.webp'))
