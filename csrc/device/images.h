// The images of a convolution as plain data, for kernels, launches and bindings alike.
#pragma once

namespace sk::device {

// Images of height x width pixels, channels innermost, and the out_h x out_w windows that a convolution takes of each.
// Window (i, j) begins at pixel (i stride_h - top, j stride_w - left), which may lie outside; its tap (r, s) is the
// pixel (r dilation_h, s dilation_w) further on. In the matrix that the windows are, a row is a window, and K runs
// (r, s, channel). kernel_w is 0 where there are no images.
struct Images {
    int height, width, channels, out_h, out_w, kernel_w;
    int stride_h, stride_w, dilation_h, dilation_w, top, left;
};

}  // namespace sk::device
