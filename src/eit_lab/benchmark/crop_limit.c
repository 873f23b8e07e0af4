/* The limit that eit_lab.bench compares decode-and-crop with: libjpeg-turbo alone, on one core, decoding of each JPEG in memory
   only the rows and columns of a crop. No resize, no copy, no Python. */

#include <setjmp.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include <jpeglib.h>

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)

const char *header_version(void) { return TEXT(LIBJPEG_TURBO_VERSION); }

struct errors {
  struct jpeg_error_mgr manager;
  jmp_buf back;
};

static void leave(j_common_ptr decoder) { longjmp(((struct errors *)decoder->err)->back, 1); }
static void say_nothing(j_common_ptr decoder) { (void)decoder; }

/* Seconds for all images; -1 - i where image i cannot be decoded. boxes: top, left, height, width of each. pixels holds a whole
   image; after the call the last crop, its rows beside each other, and in *left and *width which columns they are: libjpeg widens
   a crop to the MCUs it touches. */
double decode_crops(int count, const unsigned char *const *data, const unsigned long *sizes, const int *boxes,
                    unsigned char *pixels, unsigned int *left, unsigned int *width) {
  struct jpeg_decompress_struct decoder;
  struct errors errors;
  struct timespec began, ended;
  volatile int image = 0;

  decoder.err = jpeg_std_error(&errors.manager);
  errors.manager.error_exit = leave;
  errors.manager.output_message = say_nothing;
  jpeg_create_decompress(&decoder);
  if (setjmp(errors.back)) {
    jpeg_destroy_decompress(&decoder);
    return -1.0 - image;
  }
  clock_gettime(CLOCK_MONOTONIC, &began);
  for (; image < count; image++) {
    const int *box = boxes + 4 * image;
    JDIMENSION x = (JDIMENSION)box[1], w = (JDIMENSION)box[3], done = 0, height = (JDIMENSION)box[2];
    jpeg_mem_src(&decoder, data[image], sizes[image]);
    jpeg_read_header(&decoder, TRUE);
    decoder.out_color_space = JCS_RGB;
    jpeg_start_decompress(&decoder);
    jpeg_crop_scanline(&decoder, &x, &w);
    if (box[0] > 0) jpeg_skip_scanlines(&decoder, (JDIMENSION)box[0]);
    while (done < height) {
      JSAMPROW rows[4];
      JDIMENSION wanted = height - done < 4 ? height - done : 4, row;
      for (row = 0; row < wanted; row++) rows[row] = pixels + (size_t)(done + row) * decoder.output_width * 3;
      done += jpeg_read_scanlines(&decoder, rows, wanted);
    }
    *left = x;
    *width = decoder.output_width;
    jpeg_abort_decompress(&decoder);
  }
  clock_gettime(CLOCK_MONOTONIC, &ended);
  jpeg_destroy_decompress(&decoder);
  return (double)(ended.tv_sec - began.tv_sec) + 1e-9 * (double)(ended.tv_nsec - began.tv_nsec);
}
